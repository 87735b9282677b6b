"""The picture of a run."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from veomni.accelerators import select_accelerator
from veomni.loop.reporter import Reporter
from veomni.loop.step import Step
from veomni.metrics import plot_loss
from veomni.strategies.transforms.precision import select_precision


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


def test_metrics_of_the_loop_get_a_panel(tmp_path) -> None:
    timing = {"tokens": 0, "data_seconds": 1.0, "source_loss/web": 2.0}
    lines = [{**row, **timing, "accuracy": row["step"] / 120} for row in rows(120)]
    plot_loss(write(tmp_path, lines), tmp_path / "own.png")
    plot_loss(write(tmp_path, [{**row, **timing} for row in rows(120)]), tmp_path / "plain.png")
    own, plain = (Image.open(tmp_path / name) for name in ("own.png", "plain.png"))
    assert own.size[1] > plain.size[1]
    pixels = np.asarray(own.convert("RGB")).astype(int)
    assert int((np.abs(pixels - (0x94, 0x67, 0xBD)).max(axis=2) < 12).sum()) > 150


def test_no_backend_of_pyplot_is_chosen(tmp_path) -> None:
    import subprocess
    import sys

    path = write(tmp_path, rows(3))
    program = f"""
import sys
from pathlib import Path
from types import SimpleNamespace
from veomni.metrics import plot_loss
assert "matplotlib" not in sys.modules
plot_loss(Path({str(path)!r}), Path({str(tmp_path / "x.png")!r}))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_loop_that_never_logs_has_no_picture(tmp_path: Path) -> None:
    Reporter(tmp_path, plot=True).close("finished")
    assert not (tmp_path / "loss.png").exists()


def accumulated(index: int) -> Step:
    step, model = Step(index, [], {"tokens": 0, "samples": 0}, None), torch.nn.Identity()
    step.models[model] = SimpleNamespace(routers=None, check_complete=lambda: None)
    return step


def test_the_summary_says_what_was_reached_and_where_it_is(tmp_path: Path, capsys, monkeypatch) -> None:
    import logging

    stream = io.StringIO()
    monkeypatch.setattr(logging.getLogger("veomni").handlers[0], "stream", stream)
    reporter = Reporter(tmp_path, progress_bar=True, plot=True, log_every=2)
    reporter.describe_model(torch.nn.Linear(3, 4), select_accelerator("cpu"), select_precision("fp32"), 1)
    reporter.start(0, 3)
    for step, metrics in enumerate(({"loss": 3.0}, {"loss": 2.0}, {"loss": 1.5, "eval_loss": 1.75}), start=1):
        reporter.clock.start_step()
        reporter.step = accumulated(step)
        reporter.report(metrics)
    reporter.close("finished")
    text = stream.getvalue()
    assert f"Linear, 16 parameters; steps 1 to 3; output in {tmp_path}" in text
    assert re.search(r"finished step 3 in 0 min \d+ s: loss 1\.5000, evaluation loss 1\.7500", text)
    assert f"in {tmp_path}: loss.png, metrics.jsonl" in text
    assert "step 3, evaluation: loss 1.7500" in capsys.readouterr().err
