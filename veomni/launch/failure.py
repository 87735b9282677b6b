"""How a rank ended, left as a small JSON file for the supervisor of the ranks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from veomni.config.fields import describe
from veomni.errors import EXIT_FAULT, InputError, VeOmniError

DIRECTORY_VARIABLE = "VEOMNI_FAILURE_DIR"
SUPERVISOR_VARIABLE = "VEOMNI_SUPERVISOR_PID"
_TRACEBACK_CHARACTERS = 20_000


@dataclass(frozen=True)
class Failure:
    """Why a rank ended otherwise than with 0.

    Attributes:
        type: Name of the exception's class.
        message: Its text.
        exit_code: What the process exits with.
        time: When, in seconds since the epoch.
        traceback: The last part of its traceback; empty where the message says it all (bad input, ``sys.exit``).
    """

    type: str
    message: str
    exit_code: int
    time: float
    traceback: str = ""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Describe ``error``, which ends the process."""
        text = "" if isinstance(error, (InputError, SystemExit)) else "".join(traceback.format_exception(error))
        message = describe(error) if isinstance(error, InputError) else str(error)
        return cls(type(error).__name__, message, _exit_code(error), time.time(), text[-_TRACEBACK_CHARACTERS:])

    @property
    def text(self) -> str:
        """What a person should read."""
        return self.traceback.rstrip() or f"error: {self.message}"


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        code = error.code
        return code if isinstance(code, int) else int(code is not None)
    return error.exit_code if isinstance(error, VeOmniError) else EXIT_FAULT


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    """Make a directory, readable by this user alone, that ranks leave their failures in; it goes when the run ends."""
    path = Path(tempfile.mkdtemp(prefix="veomni-ranks-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def variables(directory: Path) -> dict[str, str]:
    """Return the environment that makes ranks started by this process leave their failures in ``directory``."""
    return {DIRECTORY_VARIABLE: str(directory), SUPERVISOR_VARIABLE: str(os.getpid())}


def is_supervised() -> bool:
    """Whether the parent of this process reads failures; a program that a rank starts is not supervised itself."""
    return os.environ.get(SUPERVISOR_VARIABLE) == str(os.getppid()) and DIRECTORY_VARIABLE in os.environ


def leave(failure: Failure) -> None:
    """Write ``failure`` where the supervisor looks for it.

    Raises:
        OSError: the file cannot be written.
    """
    target = _path(Path(os.environ[DIRECTORY_VARIABLE]), int(os.environ.get("LOCAL_RANK", "0")))
    unfinished = target.with_suffix(".tmp")
    unfinished.write_text(json.dumps(asdict(failure)), encoding="utf-8")
    unfinished.replace(target)


def leave_for_torchelastic(failure: Failure) -> None:
    """Write ``failure`` in torchelastic's format to the file it names, so that its own summary shows the cause.

    Raises:
        OSError: the file cannot be written.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": failure.traceback, "timestamp": str(int(failure.time))}
        content = {"message": {"message": f"{failure.type}: {failure.message}", "extraInfo": extra}}
        Path(path).write_text(json.dumps(content), encoding="utf-8")


def found(directory: Path, local_rank: int) -> Failure | None:
    """Return what a rank of this node left in ``directory``, if anything."""
    path = _path(directory, local_rank)
    return Failure(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _path(directory: Path, local_rank: int) -> Path:
    return directory / f"rank{local_rank}.json"
