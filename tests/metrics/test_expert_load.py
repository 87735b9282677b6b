"""The picture of the experts' load."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from veomni.metrics import plot_expert_load
from veomni.metrics.plot import relative_loads


def write(folder, loads, torn=""):
    path = folder / "expert_load.jsonl"
    lines = [{"step": step, "tokens_per_expert": counts} for step, counts in enumerate(loads, 1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    return path


def share_of(path, color) -> float:
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return float((np.abs(pixels - color).max(axis=2) < 12).mean())


def test_loads_are_relative_to_their_layer():
    table = relative_loads({"tokens_per_expert": {"few": [1, 3], "more": [0, 0, 6], "none": [0, 0, 0]}})
    assert np.array_equal(table, [[0.5, 1.5, np.nan], [0, 0, 3], [0, 0, 0]], equal_nan=True)


def test_colours_say_which_experts_are_overloaded_in_the_last_step(tmp_path):
    dark_red, dark_blue, white = (103, 0, 31), (5, 48, 97), (247, 247, 247)
    path = write(tmp_path, [{"a": [1, 1, 1, 1]}, {"a": [4, 4, 0, 0]}], torn='{"step": 3, "tok')
    plot_expert_load(path, tmp_path / "uneven.png")
    plot_expert_load(write(tmp_path, [{"a": [9, 9, 9, 9]}]), tmp_path / "even.png")
    quarter = 0.2  # half of a table that fills most of the upper part of the picture
    assert share_of(tmp_path / "uneven.png", dark_red) > quarter
    assert share_of(tmp_path / "uneven.png", dark_blue) > quarter
    assert share_of(tmp_path / "even.png", white) > 2 * quarter
    assert share_of(tmp_path / "even.png", dark_red) < 0.02


@pytest.mark.parametrize("torn", ["", '{"step": 1'])
def test_no_line_no_picture(tmp_path, torn):
    plot_expert_load(write(tmp_path, [], torn), tmp_path / "load.png")
    assert not (tmp_path / "load.png").exists()
