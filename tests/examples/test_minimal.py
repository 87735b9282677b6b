"""The smallest script, started as a person starts it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "minimal.py"


@pytest.mark.parametrize("processes", ["1", "2"])
def test_it_learns(processes):
    run = subprocess.run([sys.executable, str(SCRIPT), processes], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", run.stdout)]
    assert len(losses) == 5
    assert losses[-1] < losses[0] / 4
