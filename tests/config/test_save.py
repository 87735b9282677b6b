"""What is saved loads as an equal configuration, whatever its values look like."""

from __future__ import annotations

import random
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.config.samples import config
from veomni.errors import ConfigError
from veomni.run_config import Config, save_args

_TEXTS = [
    "no", "on", "y", "1e-4", "1E5", ".5", "0123", "0x1f", "0o7", "null", "~", "true", "1:30", "2024-01-01", "a: b",
    "# c", "- d", "{e}", "[f", "&g", "*h", "!i", "é", "日本", "line\nbreak", " spaced ", "tab\tbed", "'quoted\"", "%j",
    "@k", "1_000", ".inf", "\x85next", "\u2028", "😀", "\\n", "<<", "=",
]  # fmt: skip


@pytest.mark.parametrize("text", _TEXTS)
def test_any_text_survives(tmp_path: Path, text: str) -> None:
    original = config(data__text_key=text, model__config_overrides={text: [text, {"a": text}]})
    assert Config.from_file(save_args(original, tmp_path)) == original


@pytest.mark.parametrize("seed", range(20))
def test_any_configuration_survives(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    shared: list[Any] = [draw.random() * 10 ** draw.randint(-300, 300), draw.randint(-(2**70), 2**70)]
    original = config(
        train__optimizer__lr=draw.random() * 10 ** draw.randint(-20, 20),
        train__optimizer__betas=[draw.random(), draw.random()],
        train__optimizer__no_decay=[draw.choice(_TEXTS) for _ in range(3)],
        train__max_grad_norm=draw.choice([1.0, 1e-7, float("inf")]),
        train__max_steps=draw.choice([None, 1, 10**9]),
        train__seed=draw.randrange(2**63),
        train__devices=draw.choice(["auto", 4]),
        data__pin_memory=draw.choice(["auto", True, False]),
        data__train_path=draw.choice(["a", ["a", "1e3"]]),
        model__config_overrides={"x": shared, "y": shared, "z": draw.choice([None, True, 1, 1.0, "1"])},
    )
    loaded = Config.from_file(save_args(original, tmp_path))
    assert loaded == original
    assert repr(loaded) == repr(original), "1 and 1.0 are equal, but not the same"


def test_the_file_is_private_and_replaced(tmp_path: Path) -> None:
    save_args(config(), tmp_path / "deep" / "out")
    path = save_args(config(train__seed=5), tmp_path / "deep" / "out")
    assert path == tmp_path / "deep" / "out" / "veomni_cli.yaml"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["veomni_cli.yaml"]
    assert Config.from_file(path).train.seed == 5


def test_a_place_that_cannot_be_written_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--train\.output_dir"):
        save_args(config(), tmp_path / "file")
