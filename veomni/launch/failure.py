"""How a rank ended, left as a small JSON file for the supervisor of the ranks."""

from __future__ import annotations

import json
import os
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from veomni.config.fields import describe
from veomni.errors import EXIT_FAULT, InputError, VeOmniError
from veomni.launch.environment import SUPERVISOR_VARIABLE

DIRECTORY_VARIABLE = "VEOMNI_FAILURE_DIR"
_TRACEBACK_CHARACTERS = 20_000


@dataclass(frozen=True)
class Failure:
    """Why a rank ended otherwise than with 0.

    Attributes:
        type: Name of the exception's class.
        message: Its text.
        exit_code: What the process exits with.
        time: When, in seconds since the epoch.
        traceback: The last part of its traceback; empty where the message is complete (bad input, ``sys.exit``).
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
        """What is printed."""
        return self.traceback.rstrip() or f"error: {self.message}"


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        code = error.code
        return code if isinstance(code, int) else int(code is not None)
    return error.exit_code if isinstance(error, VeOmniError) else EXIT_FAULT


def leave_failure(failure: Failure) -> bool:
    """Write ``failure`` for the supervisor; return False where there is none, as in a program that a rank starts.

    Raises:
        OSError: the file cannot be written.
    """
    directory = os.environ.get(DIRECTORY_VARIABLE)
    if directory is None or os.environ.get(SUPERVISOR_VARIABLE) != str(os.getppid()):
        return False
    target = _path(Path(directory), int(os.environ.get("LOCAL_RANK", "0")))
    unfinished = target.with_suffix(".tmp")
    unfinished.write_text(json.dumps(asdict(failure)), encoding="utf-8")
    unfinished.replace(target)
    return True


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


def found_failure(directory: Path, local_rank: int) -> Failure | None:
    """Return what a rank of this node left in ``directory``, if anything."""
    path = _path(directory, local_rank)
    return Failure(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _path(directory: Path, local_rank: int) -> Path:
    return directory / f"rank{local_rank}.json"
