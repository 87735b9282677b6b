"""The ``veomni`` command: a function for each subcommand, and exit codes that scripts can rely on."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from typing_extensions import override

from veomni.cli import data, doctor, export, plan
from veomni.errors import EXIT_BAD_INPUT, EXIT_FAULT, ConfigError, LaunchError
from veomni.launch import entrypoint
from veomni.version import __version__

_EPILOG = f"exit codes: 0 done, {EXIT_FAULT} fault, 75 preempted and saved, {EXIT_BAD_INPUT} bad input"


class _Command(NamedTuple):
    """A subcommand: ``run`` gets its arguments, and the configuration and overrides that are left, if it takes any."""

    run: Callable[[argparse.Namespace, Sequence[str]], None]
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    takes_config: bool = False


class _Parser(argparse.ArgumentParser):
    @override
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}", f"`{self.prog} --help` shows how it is used")


@entrypoint
def main(argv: Sequence[str] | None = None) -> None:
    """Run the ``veomni`` command; ``argv`` are its arguments, by default those of the command line."""
    given = sys.argv[1:] if argv is None else argv
    if not given:
        _parser().print_help()
        return
    arguments, rest = _parser().parse_known_args(given)
    command = _COMMANDS[arguments.command]
    if rest and not command.takes_config:
        raise ConfigError(f"veomni {arguments.command}: unknown argument {rest[0]!r}", "see its --help")
    try:
        command.run(arguments, rest)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="veomni", description="Components for distributed training, from the shell.", epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"veomni {__version__}")
    commands: Any = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        text = command.help
        command.add_arguments(
            commands.add_parser(name, help=text, description=text, epilog=_EPILOG, allow_abbrev=False)
        )
    return parser


def _launch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "veomni launch FILE.py CONFIG.yaml [--section.key VALUE ...]"
    parser.add_argument("script", metavar="FILE.py", help="the script, such as examples/train.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its configuration and overrides")


def _launch(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Become the script: its exit code and the signals it gets are its own, and no process is left between."""
    script, given = arguments.script, arguments.arguments
    if script.endswith((".yaml", ".yml")):
        fix = f"veomni launch examples/train.py {' '.join([script, *given])}"
        raise LaunchError(f"{script} is a configuration, not a script", fix)
    if not Path(script).is_file():
        raise LaunchError(f"there is no script {script}", "give the path of a Python file")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, script, *given])  # noqa: S606


def _schema(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from veomni.run_config import Config

    print(json.dumps(Config.model_json_schema(), indent=2))


_COMMANDS = {
    "launch": _Command(_launch, "run a training script, which starts its own ranks", _launch_arguments),
    "doctor": _Command(doctor.run, "print versions, devices, extras, backends and disk space, for bug reports"),
    "plan": _Command(
        plan.run, "print the mesh, the memory of a rank and the batch arithmetic of a configuration",
        plan.add_arguments, takes_config=True,
    ),
    "data": _Command(
        data.run, "print documents as tokens, supervised ones in colour, and draw how long they are",
        data.add_arguments, takes_config=True,
    ),
    "export": _Command(
        export.run, "write a checkpoint's model in Hugging Face layout, or the safetensors of any module",
        export.add_arguments,
    ),
    "schema": _Command(_schema, "print the JSON schema of the configuration; every key has its description"),
}  # fmt: skip
