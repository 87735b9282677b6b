"""Shell commands of the documentation: split into words, run, or only checked."""

from __future__ import annotations

import logging
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from veomni.cli import main as veomni
from veomni.config.overrides import parse_argv
from veomni.logging import create_logger
from veomni.run_config import Config, check_layout
from veomni.testing.ranks import RankFailed, run_ranks

_SCRIPT = "examples/train.py"


def commands(text: str) -> list[str]:
    """Return the commands of a block, continued lines joined, comments and what a console printed left out."""
    lines = text.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def run(command: str) -> tuple[int, str]:
    """Run a command in the working directory and return its exit code and what it printed.

    What takes a configuration runs in forks of this process, which has imported everything already; anything else in
    a shell of its own.
    """
    words = shlex.split(command, comments=True)
    for start in (["python", _SCRIPT], ["veomni", "launch", _SCRIPT]):
        if words[: len(start)] == start:
            return _train(_SCRIPT, words[len(start) :])
    if words[0] == "veomni":
        return forked(lambda: veomni(words[1:]), 1)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command], env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


def forked(function: Callable[[], None], ranks: int) -> tuple[int, str]:
    printed = Path("printed.txt").resolve()
    printed.write_bytes(b"")
    code, error = 0, ""
    try:
        run_ranks(_captured, ranks, function, printed, init=False)
    except RankFailed as failed:
        raised = next(iter(failed.exceptions.values()), None)
        ended = re.search(r"ended with status (\d+)", str(failed))
        code = int(raised.code or 0) if isinstance(raised, SystemExit) else int(ended[1]) // 256 if ended else 1
        error = str(failed)
    text = printed.read_text()
    return code, text if code in (0, 75, 78) else text + error


def _captured(function: Callable[[], None], printed: Path) -> None:
    with printed.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", closefd=False)
    logging.getLogger("veomni").handlers.clear()  # they hold streams of the process that was forked
    create_logger(__name__)
    function()


def _train(path: str, arguments: list[str]) -> tuple[int, str]:
    arguments = [*arguments, "--train.accelerator=cpu"]

    def script() -> None:
        sys.argv = [path, *arguments]
        runpy.run_path(path, run_name="__main__")

    return forked(script, _ranks(arguments))


def _ranks(arguments: list[str]) -> int:
    try:
        return Config.from_file(*parse_argv(arguments)).train.local_processes("cpu", 1)
    except Exception:  # the script says what is wrong
        return 1


def check(command: str) -> None:
    """Check what a command that is not run says: the script is there, and configuration and layout hold."""
    words = shlex.split(command.partition(";")[0], comments=True)
    script = next((index for index, word in enumerate(words) if word == _SCRIPT), None)
    if script is not None:
        arguments = words[script + 1 :]
    elif words[:2] == ["veomni", "plan"]:
        arguments = words[2:]
    else:
        return
    config = Config.from_file(*parse_argv(arguments))
    world = _world(words)
    check_layout(config, world or config.train.local_processes("cpu", 1))


def _world(words: list[str]) -> int | None:
    """Return the ranks that a command line starts, as far as it says so itself."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    nodes = given.get("NNODES") or given.get("--nnodes") or given.get("--nodes") or 1
    here = given.get("NPROC_PER_NODE") or given.get("--nproc-per-node") or given.get("--ntasks-per-node")
    return None if here is None else int(nodes) * int(here)
