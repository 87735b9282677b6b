"""YAML as people expect it: the scalars of YAML 1.2, no duplicate keys, aliases or tags, every error with its line."""

import os
import re
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from veomni.config.base import Section
from veomni.errors import ConfigError
from veomni.version import __version__

_MAX_BYTES = 1 << 20
_PREFIX = "tag:yaml.org,2002:"
# The plain scalars of the core schema (https://yaml.org/spec/1.2.2/#103-core-schema): tag, pattern and value. PyYAML
# reads YAML 1.1, where 1e-4 is a string, no is false and 0123 is 83.
_SCALARS: tuple[tuple[str, str, Callable[[str], Any]], ...] = (
    ("null", r"~|null|Null|NULL|", lambda text: None),
    ("bool", r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    (
        "int", r"[-+]?[0-9]{1,999}|0o[0-7]{1,999}|0x[0-9a-fA-F]{1,999}",
        lambda text: int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)),
    ),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        lambda text: float(text.replace(".", "") if text[-1].isalpha() else text),
    ),
)  # fmt: skip
_VALUES = {_PREFIX + tag: value for tag, _, value in _SCALARS}


class _CoreLoader(yaml.SafeLoader):
    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name
        self.lines: dict[tuple[str, ...], int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _error(self.name, line, "anchors and aliases are not allowed", "write the value out")
        if getattr(event, "tag", None):
            raise _error(self.name, line, f"tags are not allowed: {event.tag}", "write the plain value")
        return super().compose_node(parent, index)

    def plain(self, node: yaml.Node, path: tuple[str, ...] = ()) -> Any:
        """Return a node as dicts, lists and scalars, noting the line of every key."""
        if isinstance(node, yaml.MappingNode):
            return {key.value: self.plain(value, self._noted(key, path)) for key, value in node.value}
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, (*path, str(index))) for index, item in enumerate(node.value)]
        return _VALUES.get(node.tag, str)(node.value)

    def _noted(self, key: yaml.Node, path: tuple[str, ...]) -> tuple[str, ...]:
        line, here = key.start_mark.line + 1, (*path, key.value)
        if key.tag != f"{_PREFIX}str":
            shown = repr(key.value) if isinstance(key, yaml.ScalarNode) else f"({type(key).__name__})"
            raise _error(self.name, line, f"the key {shown} is not a string", "put the key in quotes")
        if here in self.lines:
            problem = f"the key {'.'.join(here)} was already given on line {self.lines[here]}"
            raise _error(self.name, line, problem, "keep one of the two")
        self.lines[here] = line
        return here


class CoreDumper(yaml.SafeDumper):
    """Writes what :func:`read_yaml` reads back equal: strings that look like numbers are quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal objects twice, as aliases are not read."""
        return True


for _class in (_CoreLoader, CoreDumper):
    _class.yaml_implicit_resolvers = {}  # none of YAML 1.1's
    for _tag, _pattern, _ in _SCALARS:
        _class.add_implicit_resolver(f"{_PREFIX}{_tag}", re.compile(f"^(?:{_pattern})$"), None)


def read_yaml(
    path: str | Path, extending: tuple[Path, ...] = ()
) -> tuple[dict[str, Any], Mapping[tuple[str, ...], str]]:
    """Return the mapping that a YAML file holds, and where every key was given ("tiny.yaml:12") by its path.

    The key ``extends`` at the top names another file, relative to this one, whose values hold where this one gives
    none; mappings are merged, everything else is replaced.
    """
    name, path = str(path), Path(path)
    value, lines = _parse(_read_text(path, name), name)
    if value is None:
        raise ConfigError(f"{name} is empty", "give the sections model, data and train")
    if not isinstance(value, dict):
        raise _error(name, 1, f"a {type(value).__name__}, not a mapping", "give the sections model, data and train")
    places = {key: f"{name}:{line}" for key, line in lines.items()}
    base = value.pop("extends", None)
    if base is None:
        return value, places
    line = lines["extends",]
    if not isinstance(base, str) or not base:
        raise _error(name, line, f"extends is {base!r}", "give the path of a YAML file")
    chain = (*extending, path.resolve())
    target = path.parent / base
    if target.resolve() in chain:
        shown = " -> ".join(item.name for item in (*chain, target))
        raise _error(name, line, f"extends goes in a circle: {shown}", "remove one of them")
    if not target.is_file():
        raise _error(name, line, f"extends names {target}, which is no file", "give a path relative to this file")
    inherited, places_there = read_yaml(target, chain)
    return merged(inherited, value), {**places_there, **places}


def merged(
    base: Mapping[str, Any], values: Mapping[str, Any], choices: Collection[str] = (), group: str = ""
) -> dict[str, Any]:
    """Return ``base`` with ``values`` over it: mappings are merged, everything else is replaced.

    A name in ``base`` whose dotted key, after the prefix ``group``, is in ``choices`` counts as ``{"name": name}``.
    """
    result = dict(base)
    for key, value in values.items():
        present, here = result.get(key), f"{group}{key}"
        if isinstance(present, str) and here in choices:
            present = {"name": present}
        if isinstance(present, Mapping) and isinstance(value, Mapping):
            value = merged(present, value, choices, f"{here}.")
        result[key] = value
    return result


def save_args(config: Section, output_dir: str | Path) -> Path:
    """Write ``<output_dir>/veomni_cli.yaml``, which reads back equal, in one step and for its owner only; return it."""
    path = Path(output_dir) / "veomni_cli.yaml"
    body = yaml.dump(config.model_dump(), Dumper=CoreDumper, sort_keys=False, width=120)
    text = f"# Every argument of a run of veomni {__version__}; start it again with this file.\n{body}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", "give another --train.output_dir") from None
    return path


def parse_value(text: str, name: str) -> Any:
    """Return the scalar, list or mapping that ``text`` is in YAML; ``name`` is where it was given, for errors."""
    return _parse(text, name)[0]


def _read_text(path: Path, name: str) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        if len(raw) > _MAX_BYTES:
            raise ConfigError(f"{name} is larger than 1 MiB", "give a configuration, not a data file")
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror}", "give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _error(name, line, f"byte 0x{raw[error.start]:02x} is not UTF-8", "save the file as UTF-8") from None


def _parse(text: str, name: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    try:
        loader = _CoreLoader(text, name)
        node = loader.get_single_node()
        return (None if node is None else loader.plain(node)), loader.lines
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _error(name, line, f"character U+{error.character:04X} is not allowed", "remove it") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(part for part in (error.context, error.problem) if part)
        fix = "correct the YAML; put text with special characters in quotes"
        fix = "indent with spaces, not tabs" if "\\t" in problem else fix
        raise _error(name, mark.line + 1 if mark else 1, problem, fix) from None
    except RecursionError:
        raise ConfigError(f"{name} is nested too deeply", "flatten it") from None


def _error(name: str, line: int, problem: str, fix: str) -> ConfigError:
    return ConfigError(f"{name}:{line}: {problem}", fix)
