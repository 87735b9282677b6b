"""``veomni launch``: run a training script with this interpreter."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from veomni.errors import LaunchError

HELP = "run a training script, which starts its own ranks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.usage = "veomni launch FILE.py CONFIG.yaml [--section.key VALUE ...]"
    parser.add_argument("script", metavar="FILE.py", help="the script, such as examples/train.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its configuration and overrides")


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Become the script: its exit code and the signals it gets are its own, and no process is left between.

    Raises:
        LaunchError: there is no such file.
    """
    if arguments.script.endswith((".yaml", ".yml")):
        rest_of_line = " ".join([arguments.script, *arguments.arguments])
        raise LaunchError(
            f"{arguments.script} is a configuration, not a script", f"veomni launch examples/train.py {rest_of_line}"
        )
    if not Path(arguments.script).is_file():
        raise LaunchError(f"there is no script {arguments.script}", "give the path of a Python file")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, arguments.script, *arguments.arguments])  # noqa: S606
