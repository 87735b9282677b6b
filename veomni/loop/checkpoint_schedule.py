"""When a run saves and what it continues from; the checkpointer writes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge
from torch import nn

from veomni.errors import CheckpointError, NonFiniteError
from veomni.logging import create_logger
from veomni.loop.sync import extremes
from veomni.parallel.wrappers import local_shard

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
            problem = f"resume is {resume}, but there is no directory"
            raise CheckpointError(problem, "give CheckpointSchedule a directory")
        self.directory = None if directory is None else Path(directory)
        self.save_steps, self.save_final, self.resume_from = save_steps, save_final, resume
        self._options: dict[str, Any] = {"keep_last": keep_last, "async_save": async_save, "verify_hash": verify_hash}
        self._options["signature"] = dict(signature or {})
        self.stopping = self.last = False
        self._saved = 0

    @cached_property
    def _checkpointer(self) -> Checkpointer | None:
        from veomni.checkpoint import Checkpointer

        return None if self.directory is None else Checkpointer(self.directory, **self._options)

    def save_if_due(self, state: Mapping[str, Any], step: int) -> None:
        """Save ``state`` when it is due, unless a parameter is not finite (NonFiniteError); collective."""
        regular = self.save_steps is not None and step % self.save_steps == 0
        if step == self._saved or not (regular or self.stopping or (self.last and self.save_final)):
            return
        if self._checkpointer is None:
            logger.warning_once("nothing is saved: the launcher was given no checkpoint directory")
            return
        _check_finite(state, step)
        self._checkpointer.save(state, step)
        self._saved = step

    def resume(self, state: Mapping[str, Any]) -> int:
        """Load what to continue from into ``state`` and return its step; 0 when there is nothing; collective."""
        if self._checkpointer is None:
            return 0
        if self.resume_from == "auto":
            self._saved = self._checkpointer.load_latest(state) or 0
            return self._saved
        step = 0 if self.resume_from == "none" else self._checkpointer.load(state, Path(self.resume_from))
        self._checkpointer.check_none_newer(step)
        return step

    def close(self) -> None:
        """Wait for a save in the background; its error is raised here."""
        if checkpointer := vars(self).pop("_checkpointer", None):
            checkpointer.wait()
            checkpointer.close()


def _check_finite(state: Mapping[str, Any], step: int) -> None:
    modules = {key: value for key, value in state.items() if isinstance(value, nn.Module)}
    found = [
        f"{key}: {name}" for key, module in modules.items() for name, parameter in module.named_parameters()
        if parameter.requires_grad and not local_shard(parameter).isfinite().all()
    ]  # fmt: skip
    if extremes(len(found))[1]:
        shown = found[0] if found else "parameters of another rank"
        raise NonFiniteError(
            f"{shown} is not finite after step {step}, and no checkpoint was saved; "
            "call launcher.clip_grad_norm, which stops before the step that would write it"
        )
