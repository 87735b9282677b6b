"""How ranks end: what each leaves for its supervisor, and what all ends mean together."""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from veomni.config.fields import describe
from veomni.errors import EXIT_BAD_INPUT, EXIT_FAULT, EXIT_PREEMPTED, InputError, VeOmniError
from veomni.launch.environment import SUPERVISOR_VARIABLE

DIRECTORY_VARIABLE = "VEOMNI_FAILURE_DIR"
_TRACEBACK_CHARACTERS = 20_000


@dataclass(frozen=True)
class Failure:
    """Why a rank did not end with 0, and when (since the epoch); no traceback for bad input and ``sys.exit``."""

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

    def leave(self) -> bool:
        """Write it for the supervisor; return False where there is none, as in a program that a rank starts."""
        directory = os.environ.get(DIRECTORY_VARIABLE)
        if directory is None or os.environ.get(SUPERVISOR_VARIABLE) != str(os.getppid()):
            return False
        target = _file(Path(directory), int(os.environ.get("LOCAL_RANK", "0")))
        unfinished = target.with_suffix(".tmp")
        unfinished.write_text(json.dumps(asdict(self)), encoding="utf-8")
        unfinished.replace(target)
        return True

    def leave_for_torchelastic(self) -> None:
        """Write it in torchelastic's format to the file it names, so that its own summary shows the cause."""
        path = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if path:
            extra = {"py_callstack": self.traceback, "timestamp": str(int(self.time))}
            content = {"message": {"message": f"{self.type}: {self.message}", "extraInfo": extra}}
            Path(path).write_text(json.dumps(content), encoding="utf-8")


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        code = error.code
        return code if isinstance(code, int) else int(code is not None)
    return error.exit_code if isinstance(error, VeOmniError) else EXIT_FAULT


def found_failure(directory: Path, local_rank: int) -> Failure | None:
    """Return what a rank of this node left in ``directory``, if anything."""
    path = _file(directory, local_rank)
    return Failure(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _file(directory: Path, local_rank: int) -> Path:
    return directory / f"rank{local_rank}.json"


class RankEnd(NamedTuple):
    """How one rank ended, its status as of :mod:`subprocess`; ``stopped`` is because another rank had failed."""

    rank: int
    pid: int
    status: int
    stopped: bool
    seen: float
    failure: Failure | None

    @property
    def code(self) -> int:
        """The exit code that the rank meant, even when it was killed on its way out."""
        return self.failure.exit_code if self.failure else self.status

    @property
    def failed(self) -> bool:
        """Whether it neither finished nor was preempted."""
        return self.code not in (0, EXIT_PREEMPTED)

    @property
    def description(self) -> str:
        """One line for a report."""
        who = f"rank {self.rank} (pid {self.pid})"
        if self.failure and self.failure.type != "SystemExit":
            return f"{who}: {self.failure.type}: {self.failure.message.partition(chr(10))[0]}"
        if self.stopped and self.status in (-signal.SIGTERM, -signal.SIGKILL):
            return f"{who} was stopped"
        if self.status < 0:
            return f"{who} was killed by {signal.Signals(-self.status).name}"
        return f"{who} exited with code {self.code}"


class Verdict(NamedTuple):
    """The end of a run: 0, 70, 75 or 78, and what to print; empty when there is nothing to explain."""

    exit_code: int
    report: str


def judge(ends: Sequence[RankEnd]) -> Verdict:
    """Return the verdict over the ranks of one node."""
    codes = {end.code for end in ends}
    if len(codes) == 1 and codes <= {0, EXIT_PREEMPTED}:
        return Verdict(codes.pop(), "")
    failed = [end for end in ends if end.failed]
    if not failed:
        problem = "run failed: some ranks finished, others stopped early to be resumed"
        return Verdict(EXIT_FAULT, f"{problem}{_listed(ends)}")
    first = min(failed, key=_order)
    if first.code == EXIT_BAD_INPUT and first.failure:
        return Verdict(EXIT_BAD_INPUT, first.failure.text)
    cause = f"{first.failure.traceback.rstrip()}\n" if first.failure and first.failure.traceback else ""
    others = _listed([end for end in failed if end is not first])
    code = EXIT_BAD_INPUT if first.code == EXIT_BAD_INPUT else EXIT_FAULT
    return Verdict(code, f"{cause}run failed: {first.description}{others}")


def _listed(ends: Sequence[RankEnd]) -> str:
    return "".join(f"\n  {end.description}" for end in sorted(ends))


def _order(end: RankEnd) -> tuple[bool, bool, float]:
    # A killed rank leaves no time of its own and its peers fail milliseconds later, so it goes before the errors that
    # they leave. SIGABRT is no such sign: gloo and NCCL abort a process because of what another one did.
    killed = end.failure is None and end.status < 0 and end.status != -signal.SIGABRT
    return end.stopped and end.failure is None, not killed, end.failure.time if end.failure else end.seen
