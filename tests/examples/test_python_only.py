"""The examples without a configuration: one started as a person starts it, the others on ranks that are forked warm."""

from __future__ import annotations

import io
import json
import logging
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from safetensors.torch import load_file

from veomni.testing.ranks import run_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, ranks: int, *arguments: object) -> str:
    """Run an example on ranks; return what the first prints and logs."""
    return run_ranks(_script, ranks, [name, *map(str, arguments)], init=False, timeout=240)[0]


def _script(argv: list[str]) -> str:
    sys.argv, printed = argv, io.StringIO()
    logging.getLogger("veomni").addHandler(logging.StreamHandler(printed))
    with redirect_stdout(printed), redirect_stderr(printed):
        runpy.run_path(str(EXAMPLES / argv[0]), run_name="__main__")
    return printed.getvalue()


def numbers(name: str, printed: str) -> list[float]:
    return [float(value) for value in re.findall(rf"{name} ([\d.]+)", printed)]


def falls(printed: str) -> bool:
    losses = numbers("loss", printed)
    return losses[-1] < losses[0] / 3


def test_an_example_starts_its_own_ranks():
    command = [sys.executable, str(EXAMPLES / "minimal.py"), "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert falls(done.stdout)


@pytest.mark.parametrize(("name", "ranks"), [("minimal.py", 1), ("custom_strategy.py", 2)])
def test_the_loss_falls(name, ranks):
    assert falls(run(name, ranks, ranks))


def test_a_student_follows_its_teacher():
    printed = run("two_models.py", 2, 2)
    teacher, student = numbers("teacher", printed), numbers("student", printed)
    assert teacher[-1] < 0.2
    assert student[-1] < 0.5 * max(student)


def test_a_plain_module_from_its_loader_to_its_export(tmp_path):
    first = run("plain_module.py", 2, tmp_path, 2)
    assert "samples/s" in first
    second = run("plain_module.py", 2, tmp_path, 3)
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
