"""The picture of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from veomni.loop.reporter import Reporter
from veomni.metrics import plot_loss


def rows(steps: int, eval_every: int = 0) -> list[dict]:
    noise = np.random.default_rng(0)
    found = []
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 2 + 5 * math.exp(-step / 40) + noise.normal() * 0.1, "grad_norm": 1 + step**-0.5}
        if eval_every and step % eval_every == 0:
            row["eval_loss"] = 2.2 + 5 * math.exp(-step / 40)
        found.append(row)
    return found


def write(folder: Path, lines: list[dict], torn: str = "") -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    return path


def colors(path: Path) -> dict[str, int]:
    """Pixels of each of the three curves, by matplotlib's names."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    wanted = {"blue": (0x1F, 0x77, 0xB4), "red": (0xD6, 0x27, 0x28), "green": (0x2C, 0xA0, 0x2C)}
    return {name: int((np.abs(pixels - rgb).max(axis=2) < 12).sum()) for name, rgb in wanted.items()}


def test_train_evaluation_and_gradient_norm_are_drawn(tmp_path) -> None:
    plot_loss(write(tmp_path, rows(120, eval_every=20)), tmp_path / "loss.png")
    found = colors(tmp_path / "loss.png")
    assert min(found.values()) > 150, found


@pytest.mark.parametrize("steps", [3, 120, 1000])
def test_without_evaluation_there_is_no_red(tmp_path, steps) -> None:
    plot_loss(write(tmp_path, rows(steps)), tmp_path / "loss.png")
    found = colors(tmp_path / "loss.png")
    assert found["red"] == 0
    assert found["blue"] > 50


def test_nulls_and_a_torn_last_line_are_left_out(tmp_path) -> None:
    lines = [{"step": 1, "loss": None, "grad_norm": None}, *rows(5)]
    plot_loss(write(tmp_path, lines, torn='{"step": 6, "lo'), tmp_path / "torn.png")
    plot_loss(write(tmp_path, rows(5)), tmp_path / "whole.png")
    torn, whole = (np.asarray(Image.open(tmp_path / name)) for name in ("torn.png", "whole.png"))
    assert np.array_equal(torn, whole)


def test_a_run_of_no_steps_gives_an_empty_picture(tmp_path) -> None:
    plot_loss(write(tmp_path, []), tmp_path / "loss.png")
    assert sum(colors(tmp_path / "loss.png").values()) == 0


def test_no_backend_of_pyplot_is_chosen(tmp_path) -> None:
    import subprocess
    import sys

    path = write(tmp_path, rows(3))
    program = f"""
import sys
from pathlib import Path
from veomni.metrics import plot_loss
assert "matplotlib" not in sys.modules
plot_loss(Path({str(path)!r}), Path({str(tmp_path / "x.png")!r}))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_loop_that_never_logs_has_no_picture(tmp_path: Path) -> None:
    Reporter(tmp_path, plot=True).close("finished")
    assert not (tmp_path / "loss.png").exists()
