"""The examples without a configuration, each started as a person starts it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def numbers(name: str, printed: str) -> list[float]:
    return [float(value) for value in re.findall(rf"{name} ([\d.]+)", printed)]


@pytest.mark.parametrize(("name", "ranks"), [("minimal.py", 1), ("minimal.py", 2), ("custom_strategy.py", 2)])
def test_the_loss_falls(name, ranks):
    losses = numbers("loss", run(name, ranks))
    assert losses[-1] < losses[0] / 3


def test_a_student_follows_its_teacher():
    printed = run("two_models.py", 2)
    teacher, student = numbers("teacher", printed), numbers("student", printed)
    assert teacher[-1] < 0.2
    assert student[-1] < 0.5 * max(student)


def test_a_plain_module_from_its_loader_to_its_export(tmp_path):
    first = run("plain_module.py", tmp_path, 2)
    assert "samples/s" in first
    second = run("plain_module.py", tmp_path, 3)
    assert "resumed from" in second
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 70))
    assert rows[-1]["loss"] < 0.75 * rows[0]["loss"]
    accuracies = [row["eval_accuracy"] for row in rows if row.get("eval_accuracy") is not None]
    assert len(accuracies) == 3
    assert all(round(accuracy * 360, 3).is_integer() for accuracy in accuracies), "each of 360 held-out scans once"
    assert accuracies[-1] > 0.3
    assert all(row["samples"] == 64 for row in rows if row["step"] % 23)
    assert (tmp_path / "loss.png").exists()
    assert "blocks.3.linear1.weight" in load_file(tmp_path / "export" / "model.safetensors")
