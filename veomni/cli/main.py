"""The ``veomni`` command: a function for each subcommand, and exit codes that scripts can rely on."""

import argparse
import json
import os
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from typing_extensions import override

from veomni.errors import EXIT_BAD_INPUT, EXIT_FAULT, CheckpointError, ConfigError, LaunchError
from veomni.launch import entrypoint
from veomni.logging import create_logger
from veomni.version import __version__

logger = create_logger(__name__)

_EPILOG = f"exit codes: 0 done, {EXIT_FAULT} fault, 75 preempted and saved, {EXIT_BAD_INPUT} bad input"


class _Command(NamedTuple):
    """A subcommand: where its function is, imported when it runs, and its arguments as ``add_argument`` takes them."""

    function: str
    help: str
    arguments: Mapping[str, Mapping[str, Any]] = {}
    usage: str | None = None
    takes_config: bool = False  # then it also gets what its arguments leave: a configuration and overrides


_COMMANDS = {
    "launch": _Command(
        "veomni.cli.main:launch", "run a training script, which starts its own ranks",
        {
            "script": {"metavar": "FILE.py", "help": "the script, such as examples/train.py"},
            "arguments": {"nargs": argparse.REMAINDER, "metavar": "...", "help": "its configuration and overrides"},
        },
        "veomni launch FILE.py CONFIG.yaml [--section.key VALUE ...]",
    ),
    "doctor": _Command(
        "veomni.cli.doctor:run", "print versions, devices, extras, backends and disk space, for bug reports"
    ),
    "plan": _Command(
        "veomni.cli.plan:run", "print the mesh, the memory of a rank and the batch arithmetic of a configuration",
        {
            "--world": {"type": int, "metavar": "N", "help": "ranks over all nodes (default: what this node starts)"},
            "--device-memory": {"type": float, "metavar": "GIB", "help": "print the longest rows on such a device"},
        },
        "veomni plan CONFIG.yaml [--section.key VALUE ...] [--world N] [--device-memory GIB]", takes_config=True,
    ),
    "data": _Command(
        "veomni.cli.data:run", "print documents as tokens, supervised ones in colour, and draw how long they are",
        {
            "--rows": {"type": int, "default": 2, "metavar": "N", "help": "rows to print (default: %(default)s)"},
            "--documents": {
                "type": int, "default": 256, "metavar": "N",
                "help": "documents with media, or rows of a stream, that are read to measure lengths (default: "
                "%(default)s)",
            },
            "--plot": {
                "metavar": "FILE", "help": "where the histogram goes (default: data_lengths.png in train.output_dir)",
            },
        },
        "veomni data preview CONFIG.yaml [--section.key VALUE ...] [--rows N] [--documents N] [--plot FILE]",
        takes_config=True,
    ),
    "export": _Command(
        "veomni.cli.main:export", "write a checkpoint's model in Hugging Face layout, or the safetensors of any module",
        {
            "checkpoint": {"type": Path, "help": "a run's checkpoints/global_step_N directory"},
            "output_dir": {"type": Path, "help": "where to write it"},
            "--dtype": {"choices": ["float32", "bfloat16", "float16"], "help": "convert to this format"},
        },
    ),
    "schema": _Command(
        "veomni.cli.main:schema", "print the JSON schema of the configuration; every key has its description"
    ),
}  # fmt: skip


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
        pkgutil.resolve_name(command.function)(arguments, rest)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="veomni", description="Components for distributed training, from the shell.", epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"veomni {__version__}")
    commands: Any = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        about = {"help": command.help, "description": command.help, "usage": command.usage, "epilog": _EPILOG}
        sub = commands.add_parser(name, allow_abbrev=False, **about)
        for argument, options in command.arguments.items():
            sub.add_argument(argument, **options)
    return parser


def launch(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
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


def export(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Export in this process, one tensor at a time."""
    import torch

    from veomni.checkpoint import read_model_tensors
    from veomni.models import build_config, build_tokenizer, export_tensors

    assets = arguments.checkpoint.resolve().parent.parent / "model_assets"
    config = tokenizer = None
    if not assets.exists():
        logger.info("%s is not there: the weights are written by the names of the module", assets)
    elif (assets / "config.json").is_file():
        config, tokenizer = build_config(assets), build_tokenizer(assets)
    else:
        problem = f"{assets} holds no config.json, so the architecture of {arguments.checkpoint} is unknown"
        raise CheckpointError(problem, "restore it, or remove model_assets to write the weights by the module's names")
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    tensors = read_model_tensors(arguments.checkpoint)
    print(export_tensors(config, tensors, arguments.output_dir, tokenizer=tokenizer, dtype=dtype))


def schema(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print the schema."""
    from veomni.run_config import Config

    print(json.dumps(Config.model_json_schema(), indent=2))
