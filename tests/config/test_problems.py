"""Problems of a configuration together: all at once, where they are, and without the values of unknown keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.samples import write
from veomni.errors import InputError
from veomni.run_config import load_config


def test_a_command_line_without_a_file_is_rejected() -> None:
    with pytest.raises(InputError, match="no configuration file"):
        load_config(["--train.seed", "1"])


def test_all_problems_are_named_at_once_with_their_places(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", {"train.max_step": 3, "data.max_seq_len": "x"})
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "max_step" in text)
    with pytest.raises(InputError) as caught:
        load_config([str(path), "--train.seed", "y"])
    for text in (
        "3 problems",
        f"train.max_step ({path}:{line})",
        "data.max_seq_len",
        "train.seed (--train.seed) is 'y'",
    ):
        assert text in caught.value.problem


def test_the_value_of_an_unknown_key_is_not_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", {"train.logging.wandb_api_key": "s3cret"})
    with pytest.raises(InputError) as caught:
        load_config([str(path)])
    assert "wandb_api_key" in str(caught.value)
    assert "s3cret" not in str(caught.value)
