"""Every way to start a program that can be repeated is, and the others are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import clean_environment

CODE = "from veomni.launch import join_or_start; p = join_or_start(2); print(f'rank{p.rank} ', end='', flush=True)"


def run(*command: str, cwd: Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        env=clean_environment(),
    )


@pytest.mark.parametrize("form", ["-c", "-m"])
def test_code_and_modules_run_again(tmp_path: Path, form: str) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text(CODE)
    done = run(form, CODE if form == "-c" else "package", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["rank0", "rank1"]


def test_optimisation_and_x_options_are_kept(tmp_path: Path) -> None:
    script = tmp_path / "flags.py"
    script.write_text(
        CODE + "; import sys; sys.stdout.write(f'flags {sys.flags.optimize} {sys._xoptions.get(\"mine\")} ')"
    )
    done = run("-O", "-X", "mine=1", str(script), cwd=tmp_path)
    assert done.stdout.count("flags 1 1") == 2


def test_a_program_from_standard_input_is_rejected(tmp_path: Path) -> None:
    done = run("-", cwd=tmp_path, text=CODE)
    assert done.returncode != 0
    assert "cannot be started from a program read from standard input" in done.stderr
    assert "rank" not in done.stdout


def test_a_multiprocessing_worker_is_rejected(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(
        "import multiprocessing\nfrom veomni.launch import join_or_start\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        pool.map(join_or_start, [2])\n"
    )
    done = run(str(script), cwd=tmp_path)
    assert done.returncode == 1
    assert "a multiprocessing worker" in done.stderr
