"""When a run saves and what it continues from; how a checkpoint is written is the checkpointer's business."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from veomni.errors import CheckpointError
from veomni.logging import create_logger

if TYPE_CHECKING:
    from veomni.checkpoint import Checkpointer

logger = create_logger(__name__)


class CheckpointSchedule:
    """Save every N steps, at the end, and when the run is asked to stop.

    Args:
        directory: Where checkpoints go; None never saves and never resumes.
        save_steps: Steps between checkpoints; null saves only at the end and on a signal.
        save_final: Save after the last step.
        resume: auto continues from the newest valid checkpoint of ``directory``, none starts from step 0, anything else
            is the path of one checkpoint. The last two need a ``directory`` without checkpoints of later steps.
        keep_last: Checkpoints kept; at least 2, so that a damaged newest one has one to fall back to.
        async_save: Write in the background while training continues.
        verify_hash: Compare every file with the manifest's hash before loading.
        signature: What must be the same in the run that resumes (sizes of the model, say).

    Raises:
        CheckpointError: ``resume`` is a path, and there is no ``directory``.
    """

    def __init__(
        self,
        directory: Path | str | None = None,
        *,
        save_steps: Annotated[int, Ge(1)] | None = None,
        save_final: bool = True,
        resume: str = "auto",
        keep_last: Annotated[int, Ge(2)] = 2,
        async_save: bool = False,
        verify_hash: bool = True,
        signature: Mapping[str, Any] | None = None,
    ) -> None:
        if directory is None and resume not in ("auto", "none"):
            raise CheckpointError(
                f"resume is {resume}, but there is no directory", "give CheckpointSchedule a directory"
            )
        self.directory = None if directory is None else Path(directory)
        self.save_steps, self.save_final, self.resume_from = save_steps, save_final, resume
        self._options: dict[str, Any] = {"keep_last": keep_last, "async_save": async_save, "verify_hash": verify_hash}
        self._signature = dict(signature or {})
        self._checkpointer: Checkpointer | None = None
        self.stopping = False
        self.last = False
        self._saved = 0

    def _open(self) -> Checkpointer | None:
        if self._checkpointer is None and self.directory is not None:
            from veomni.checkpoint import Checkpointer

            self._checkpointer = Checkpointer(self.directory, signature=self._signature, **self._options)
        return self._checkpointer

    def save_if_due(self, state: Mapping[str, Any], step: int) -> None:
        """Save ``state`` after ``step`` when the schedule says so; collective."""
        regular = self.save_steps is not None and step % self.save_steps == 0
        if step == self._saved or not (regular or self.stopping or (self.last and self.save_final)):
            return
        checkpointer = self._open()
        if checkpointer is None:
            logger.warning_once("nothing is saved: the launcher was given no checkpoint directory")
            return
        checkpointer.save(state, step)
        self._saved = step

    def resume(self, state: Mapping[str, Any]) -> int:
        """Load what to continue from into ``state`` and return its step; 0 when there is nothing; collective.

        Raises:
            CheckpointError: the checkpoint asked for cannot be loaded, or the directory holds those of later steps.
        """
        checkpointer = self._open()
        if checkpointer is None:
            return 0
        if self.resume_from == "auto":
            self._saved = checkpointer.load_latest(state) or 0
            return self._saved
        step = 0 if self.resume_from == "none" else checkpointer.load(state, Path(self.resume_from))
        checkpointer.check_none_newer(step)
        return step

    def close(self) -> None:
        """Wait for a save in the background; its error is raised here."""
        if self._checkpointer is not None:
            self._checkpointer.wait()
            self._checkpointer.close()
            self._checkpointer = None
