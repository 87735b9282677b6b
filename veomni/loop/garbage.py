"""Python's collection of garbage, at the same steps on all ranks: elsewhere it stops one, and the others wait."""

import gc
import os

from veomni.errors import LoopError
from veomni.logging import create_logger

logger = create_logger(__name__)


class AutomaticCollection:
    """Python's own collector of this process, which is off while any schedule collects instead."""

    def __init__(self) -> None:
        self._schedules, self._enabled, self._frozen = 0, True, False
        os.register_at_fork(after_in_child=self._leave_to_child)

    def suspend(self) -> None:
        """Turn it off, once everything that exists by now is freed or exempt from later collections."""
        if not self._schedules:
            self._enabled, self._frozen = gc.isenabled(), gc.get_freeze_count() > 0
        self._schedules += 1
        gc.disable()
        gc.collect()
        gc.freeze()

    def resume(self) -> None:
        """Put it back to where it was before the first of the schedules that are left; objects frozen then stay so."""
        self._schedules = max(0, self._schedules - 1)  # none is left in a forked process
        if self._schedules:
            return
        if not self._frozen:
            gc.unfreeze()
        if self._enabled:
            gc.enable()

    def _leave_to_child(self) -> None:
        """Turn it on in a forked process, such as a worker of a loader: it takes no steps."""
        if self._schedules and self._enabled:
            gc.enable()
        self._schedules = 0


automatic = AutomaticCollection()


class GarbageSchedule:
    """Collects garbage every ``steps`` optimizer steps of one loop, from its second step on; None changes nothing.

    The first step belongs to set-up: it compiles, and creates the optimizer's state.
    """

    def __init__(self, steps: int | None) -> None:
        if steps is not None and steps < 1:
            problem, fix = f"gc_steps is {steps}", "give 1 or more, or None for Python's automatic collection"
            raise LoopError(problem, fix, field="track.gc_steps")
        self._steps, self._begun, self._active = steps, False, False

    def before(self, step: int) -> None:
        """Collect, if that is due before a step; its index is equal on all ranks."""
        if self._steps is None or not self._begun:
            self._begun = True
        elif not self._active:
            self._active = True
            automatic.suspend()
            logger.info_rank0("Python's garbage is collected every %s steps, at the same one on all ranks", self._steps)
        elif step % self._steps == 0:
            gc.collect()

    def close(self) -> None:
        """End the schedule."""
        if self._active:
            self._active = False
            automatic.resume()
