"""Scalars of YAML 1.2, and everything that is rejected, with its line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from veomni.config.yaml_file import parse_value, read_yaml
from veomni.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E3", 1000.0), (".5", 0.5), ("1.", 1.0), ("-0.25", -0.25),
        (".inf", math.inf), ("-.INF", -math.inf),
        ("no", "no"), ("on", "on"), ("yes", "yes"), ("y", "y"), ("off", "off"),
        ("true", True), ("FALSE", False), ("null", None), ("~", None),
        ("0123", 123), ("0o17", 15), ("0x1F", 31), ("+7", 7), ("1_000", "1_000"), ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"), ("'1e-4'", "1e-4"), ("<<", "<<"), ("=", "="),
        ("[1, 2.5, a]", [1, 2.5, "a"]), ("{a: {b: 1e3}}", {"a": {"b": 1000.0}}),
    ],
)  # fmt: skip
def test_a_scalar_is_what_people_expect(text: str, value: object) -> None:
    parsed = parse_value(text, "--key")
    assert parsed == value
    assert type(parsed) is type(value)


def test_lines_of_all_keys_are_known(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a:\n  b: 1\n\n  c:\n    - d: 2\n")
    values, places = read_yaml(path)
    assert values == {"a": {"b": 1, "c": [{"d": 2}]}}
    expected = {("a",): 1, ("a", "b"): 2, ("a", "c"): 4, ("a", "c", "0", "d"): 5}
    assert places == {key: f"{path}:{line}" for key, line in expected.items()}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: 1\nb: 2\na: 3\n", "a.yaml:3: the key a was already given on line 1"),
        (b"t:\n  x: 1\n  x: 1\n", "a.yaml:3: the key t.x was already given on line 2"),
        (b"a: &x 1\nb: *x\n", "a.yaml:1: anchors and aliases"),
        (b"a: 1\nb: *x\n", "a.yaml:2: anchors and aliases"),
        (b"a: !!python/object/apply:os.system [ls]\n", "a.yaml:1: tags are not allowed"),
        (b"a:\n\tb: 1\n", "a.yaml:2:"),
        (b"a: 1\nb: \xff\n", "a.yaml:2: byte 0xff is not UTF-8"),
        (b"a: 1\nb: \x00\n", "a.yaml:2: character U+0000"),
        (b"", "a.yaml is empty"),
        (b"# nothing\n", "a.yaml is empty"),
        (b"- 1\n", "a.yaml:1: a list, not a mapping"),
        (b"1: x\n", "a.yaml:1: the key '1' is not a string"),
        (b"true: x\n", "a.yaml:1: the key 'true' is not a string"),
        (b"a: {b: [1,}\n", "a.yaml:1:"),
        (b"a: 1\n---\nb: 2\n", "a.yaml:2:"),
        (b"[" * 20000, "a.yaml is nested too deeply"),
        (b"a: " + b"x" * 2_000_000, "a.yaml is larger than 1 MiB"),
    ],
)
def test_a_bad_file_is_rejected_with_its_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert said in caught.value.problem
    assert caught.value.fix


def test_tabs_are_named_in_the_fix(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a:\n\tb: 1\n")
    with pytest.raises(ConfigError, match="spaces, not tabs"):
        read_yaml(path)


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_what_is_no_file_is_rejected(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_yaml(tmp_path / name)


def test_a_byte_order_mark_is_no_part_of_a_key(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(path)[0] == {"a": 1}


def extending(tmp_path: Path, **files: str) -> tuple[dict[str, object], dict[str, str]]:
    for name, text in files.items():
        path = tmp_path / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    values, places = read_yaml(tmp_path / "top.yaml")
    return values, {".".join(key): place.removeprefix(f"{tmp_path}/") for key, place in places.items()}


def test_a_file_extends_another_and_every_key_keeps_its_place(tmp_path: Path) -> None:
    values, places = extending(
        tmp_path,
        top="extends: base/middle.yaml\na: {x: 1}\nlist: [3]\n",
        base__middle="extends: low.yaml\na:\n  y: 2\n",
        base__low="a: {x: 0, y: 0, z: 0}\nlist: [1, 2]\n",
    )
    assert values == {"a": {"x": 1, "y": 2, "z": 0}, "list": [3]}
    assert (places["a.x"], places["a.y"], places["list"]) == ("top.yaml:2", "base/middle.yaml:3", "top.yaml:3")
    assert places["a.z"] == "base/low.yaml:1"


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"top": "extends: top.yaml\n"}, r"top\.yaml:1: extends goes in a circle"),
        (
            {"top": "extends: b.yaml\n", "b": "\nextends: top.yaml\n"},
            r"b\.yaml:2: .*: top\.yaml -> b\.yaml -> top",
        ),
        ({"top": "a: 1\nextends: gone.yaml\n"}, r"top\.yaml:2: extends names .*gone\.yaml, which is no file"),
        ({"top": "extends: [a.yaml]\n"}, r"top\.yaml:1: extends is \['a\.yaml'\]"),
        ({"top": "extends: b.yaml\n", "b": "- 1\n"}, r"b\.yaml:1: a list, not a mapping"),
    ],
)
def test_what_cannot_be_extended_is_rejected_with_its_line(tmp_path: Path, files: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        extending(tmp_path, **files)
