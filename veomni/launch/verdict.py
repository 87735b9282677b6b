"""What the ends of all ranks mean together: one exit code, the rank that failed first, and a report."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import NamedTuple

from veomni.errors import EXIT_BAD_INPUT, EXIT_FAULT, EXIT_PREEMPTED
from veomni.launch.failure import Failure


class RankEnd(NamedTuple):
    """How one rank ended.

    Attributes:
        status: Exit code, or the negative number of the signal that killed it, as :mod:`subprocess` gives it.
        stopped: Whether it was stopped because another rank had failed.
        seen: When the end was noticed, in seconds since the epoch.
        failure: What it left behind.
    """

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
    """Sort the likely cause first.

    A killed rank leaves no time of its own and its peers fail milliseconds later, so it goes before the errors that
    they leave. SIGABRT is no such sign: gloo and NCCL abort a process because of what another one did.
    """
    killed = end.failure is None and end.status < 0 and end.status != -signal.SIGABRT
    return end.stopped and end.failure is None, not killed, end.failure.time if end.failure else end.seen
