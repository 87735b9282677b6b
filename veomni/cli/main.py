"""The ``veomni`` command: one module per subcommand, and exit codes that scripts can rely on."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from typing_extensions import override

from veomni.cli import data, doctor, export, launch, plan, schema
from veomni.errors import EXIT_BAD_INPUT, EXIT_FAULT, ConfigError
from veomni.launch import entrypoint
from veomni.version import __version__

_COMMANDS = {
    "launch": launch,
    "doctor": doctor,
    "plan": plan,
    "data": data,
    "export": export,
    "schema": schema,
}
_EPILOG = f"exit codes: 0 done, {EXIT_FAULT} fault, 75 preempted and saved, {EXIT_BAD_INPUT} bad input"


class _Parser(argparse.ArgumentParser):
    @override
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}", f"`{self.prog} --help` shows how it is used")


@entrypoint
def main(argv: Sequence[str] | None = None) -> None:
    """Run the ``veomni`` command.

    Args:
        argv: Arguments after the program's name; None takes them from the command line.
    """
    given = sys.argv[1:] if argv is None else argv
    if not given:
        _parser().print_help()
        return
    arguments, rest = _parser().parse_known_args(given)
    command = _COMMANDS[arguments.command]
    if rest and not getattr(command, "TAKES_CONFIG", False):
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
    for name, module in _COMMANDS.items():
        text = module.HELP
        sub = commands.add_parser(name, help=text, description=text, epilog=_EPILOG, allow_abbrev=False)
        module.add_arguments(sub)
    return parser
