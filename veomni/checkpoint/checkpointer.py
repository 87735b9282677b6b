"""Save and load the whole state of a run on any layout; a kill at any moment costs at most the save in hand."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from veomni.checkpoint.consensus import first_problem, from_rank_zero, gather, rank_and_size, shared_token
from veomni.checkpoint.directories import (
    published_steps,
    remove_leftovers,
    retire,
    set_aside,
    step_directory,
    sync_directory,
)
from veomni.checkpoint.lock import DirectoryLock
from veomni.checkpoint.manifest import (
    content_problem,
    describe_file,
    read_manifest,
    structure_problem,
    write_manifest,
)
from veomni.checkpoint.objects import read_objects, write_objects
from veomni.checkpoint.reader import WEIGHTS
from veomni.checkpoint.sharded_state import load_table, own_cause, restore, save_table, sharded_state
from veomni.errors import CheckpointError, VeOmniError
from veomni.logging import create_logger
from veomni.version import __version__

logger = create_logger(__name__)


class SaveFailedError(VeOmniError):
    """A checkpoint could not be written; nothing was published and earlier ones are intact."""


class Checkpointer:
    """Write and read ``<directory>/global_step_N``.

    A checkpoint is written under a temporary name, every rank hashes its files, rank 0 seals them with a manifest and
    renames the directory; it is never written over. All methods are collective.

    Args:
        directory: Where checkpoints go.
        keep_last: How many valid ones stay; at least 2, so that a damaged one has one to fall back to.
        async_save: Copy the state to host memory, and write it in the background on a gloo group of its own.
        verify_hash: Compare contents, not only names and sizes, before loading.
        signature: What must be equal in a run that loads.
        per_rank: Names of states that every rank has its own of (random generators).

    Raises:
        CheckpointError: another job uses the directory.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int = 2,
        async_save: bool = False,
        verify_hash: bool = True,
        signature: Mapping[str, Any] | None = None,
        per_rank: tuple[str, ...] = ("rng",),
    ) -> None:
        if keep_last < 2:
            raise CheckpointError(f"keep_last is {keep_last}", "keep at least 2 checkpoints")
        self.directory, self.keep_last, self.verify_hash = Path(directory), keep_last, verify_hash
        self._signature, self._per_rank = dict(signature or {}), per_rank
        self.rank, self.world_size = rank_and_size()
        self._async = async_save
        self._group = dist.new_group(backend="gloo") if async_save and self.world_size > 1 else None
        self._stager: Any = None
        self._thread: Thread | None = None
        self._failure: BaseException | None = None
        self._lock = DirectoryLock(self.directory)
        self._open()

    def _open(self) -> None:
        problem = self._lock.acquire() if self.rank == 0 else None
        problem = first_problem(problem)
        if problem:
            raise CheckpointError(
                problem.partition(": ")[2],
                "wait for that job, or give another directory",
                "CheckpointSchedule.directory",
            )
        if self.rank == 0 and (left := remove_leftovers(self.directory)):
            logger.warning("removed what an interrupted save left: %s", ", ".join(sorted(left)))

    # ---------------------------------------------------------------- saving

    def save(self, state: Mapping[str, Any], step: int) -> None:
        """Save ``state`` as the checkpoint of ``step``; a valid one there is kept, a damaged one renamed.

        Args:
            state: "model", "optimizer", and anything with a ``state_dict``; where each rank holds a part of it, the
                object has a ``merge_states`` that makes one state of all ranks' in order.
            step: The optimizer step it was taken after.

        Raises:
            SaveFailedError: some rank could not write, also in the background save before this one; raised on all.
        """
        self.wait()
        final = step_directory(self.directory, step)
        if from_rank_zero(final.exists()):
            damage = self._problem(final)
            if damage is None:
                logger.warning_rank0("%s is there already and stays as it is: step %s is not saved", final, step)
                return
            self._make_room(final, damage, step)
        table = sharded_state(*_model_and_optimizer(state))
        objects = {name: _whole_state(part) for name, part in state.items() if name not in ("model", "optimizer")}
        temporary = final.with_name(f"{final.name}.tmp-{shared_token()}")
        if not self._async:
            self._write(table, objects, temporary, final, step, None)
            return
        staged = self._stage({"table": table, "objects": objects})
        arguments = (staged["table"], staged["objects"], temporary, final, step, self._group)
        self._thread = Thread(target=self._write_in_background, args=arguments, name="checkpoint")
        self._thread.start()

    def _make_room(self, final: Path, damage: str, step: int) -> None:
        """Rename a damaged checkpoint that a run fell back from, and has now come past."""
        problem = None
        try:
            if self.rank == 0:
                logger.warning(
                    "%s is damaged (%s): it is kept as %s", final, damage, set_aside(final, uuid.uuid4().hex)
                )
        except OSError as error:
            problem = str(error)
        self._agree_or_discard(problem, None, step)

    def wait(self) -> None:
        """Finish a save in the background.

        Raises:
            SaveFailedError: it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _stage(self, state: dict[str, Any]) -> dict[str, Any]:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        if self._stager is None:
            pinned = torch.accelerator.is_available() and str(torch.accelerator.current_accelerator()) == "cuda"
            self._stager = DefaultStager(StagingOptions(pinned, False, False, pinned))
        staged = self._stager.stage(state)
        assert isinstance(staged, dict)
        return staged

    def _write_in_background(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:  # handed to the next save or wait, on the thread that can act on it
            self._failure = error

    def _write(
        self,
        table: dict[str, Any],
        objects: dict[str, Any],
        temporary: Path,
        final: Path,
        step: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._agree_or_discard(self._prepare(temporary), temporary, step, group)
        problem, files = None, {}
        try:
            save_table(table, temporary / WEIGHTS, group)
            files = self._write_objects(objects, temporary)
        except (Exception, CheckpointException) as error:  # PyTorch's is a BaseException
            problem = own_cause(error, self.rank)
        self._agree_or_discard(problem, temporary, step, group)
        described = gather(files, group)
        try:
            if self.rank == 0:
                self._publish(described, temporary, final, step)
        except OSError as error:
            problem = str(error)
        self._agree_or_discard(problem, temporary, step, group)

    def _prepare(self, temporary: Path) -> str | None:
        try:
            if self.rank == 0:
                (temporary / WEIGHTS).mkdir(parents=True)
        except OSError as error:
            return str(error)
        return None

    def _agree_or_discard(
        self, problem: str | None, temporary: Path | None, step: int, group: dist.ProcessGroup | None = None
    ) -> None:
        agreed = first_problem(problem, group)
        if agreed is None:
            return
        if self.rank == 0 and temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise SaveFailedError(f"the checkpoint of step {step} was not written ({agreed}); earlier ones are intact")

    def _write_objects(self, objects: dict[str, Any], temporary: Path) -> dict[str, dict[str, Any]]:
        """Write this rank's objects, and return the description of all files that are this rank's."""
        own = {name: part for name, part in objects.items() if name in self._per_rank}
        shared = {name: part for name, part in objects.items() if name not in self._per_rank}
        paths = write_objects(temporary / f"rank_{self.rank}", own)
        if self.rank == 0:
            paths += write_objects(temporary / "shared", shared)
            paths.append(temporary / WEIGHTS / ".metadata")
        paths += sorted((temporary / WEIGHTS).glob(f"__{self.rank}_*"))
        return {str(path.relative_to(temporary)): describe_file(path) for path in paths}

    def _publish(self, described: list[dict[str, Any]], temporary: Path, final: Path, step: int) -> None:
        files = {name: facts for part in described for name, facts in part.items()}
        facts = {
            "step": step,
            "world_size": self.world_size,
            "signature": self._signature,
            "veomni": __version__,
            "torch": str(torch.__version__),
        }
        write_manifest(temporary, files, facts)
        sync_directory(temporary)
        temporary.rename(final)
        logger.info("saved %s", final)
        try:
            sync_directory(self.directory)
            self._retain()
        except OSError as error:  # the checkpoint is there: this is no failed save
            logger.warning("%s is saved, but tidying up after it failed: %s", final, error)

    def _retain(self) -> None:
        valid = [step for step in self.steps() if self._quick_problem(step_directory(self.directory, step)) is None]
        for step in valid[self.keep_last :]:
            retire(step_directory(self.directory, step), uuid.uuid4().hex)

    # ---------------------------------------------------------------- loading

    def steps(self) -> list[int]:
        """Return the steps that have a published checkpoint, newest first."""
        return published_steps(self.directory)

    def check_none_newer(self, step: int) -> None:
        """Reject a directory with checkpoints of later steps than the one a run starts from.

        They are of an abandoned run: this one could not save those steps, and ``load_latest`` would take them.

        Raises:
            CheckpointError: there are some.
        """
        newer = [found for found in from_rank_zero(self.steps()) if found > step]
        if newer:
            raise CheckpointError(
                f"{step_directory(self.directory, newer[0])} is newer than step {step}, where this run starts",
                "give another directory, move the newer checkpoints away, or use resume: auto",
            )

    def load_latest(self, state: Mapping[str, Any]) -> int | None:
        """Load the newest checkpoint whose manifest verifies, and return its step; None when there is none."""
        self.wait()
        for step in from_rank_zero(self.steps()):
            directory = step_directory(self.directory, step)
            problem = self._problem(directory)
            if problem is None:
                return self._load(state, directory)
            logger.warning_rank0("%s is damaged (%s): falling back to an older checkpoint", directory, problem)
        return None

    def load(self, state: Mapping[str, Any], path: Path) -> int:
        """Load one checkpoint, and return its step; never falls back to another.

        Raises:
            CheckpointError: it is missing or damaged, or does not fit.
        """
        self.wait()
        problem = self._problem(path)
        if problem is not None:
            raise CheckpointError(f"checkpoint {path}: {problem}", "give another one, or resume: auto")
        return self._load(state, path)

    def _load(self, state: Mapping[str, Any], path: Path) -> int:
        manifest = read_manifest(path)
        assert manifest is not None
        if manifest["signature"] != self._signature:
            raise CheckpointError(
                f"{path} was saved with {manifest['signature']}, this run has {self._signature}", "make them equal"
            )
        model, optimizer = _model_and_optimizer(state)
        table = sharded_state(model, optimizer)
        load_table(table, path / WEIGHTS)
        restore(model, optimizer, table)
        self._load_objects(state, path, manifest["world_size"])
        logger.info_rank0("resumed from %s", path)
        return int(manifest["step"])

    def _load_objects(self, state: Mapping[str, Any], path: Path, world_size: int) -> None:
        saved = read_objects(path / "shared")
        if world_size == self.world_size:
            saved |= read_objects(path / f"rank_{self.rank}")
        else:
            renewed = ", ".join(self._per_rank)
            logger.info_rank0("world size changed from %s to %s: %s re-seeded", world_size, self.world_size, renewed)
        for name, part in state.items():
            if name in ("model", "optimizer") or (name in self._per_rank and name not in saved):
                continue
            if name not in saved:
                raise CheckpointError(
                    f"{path} holds no state of {name!r}", "leave it out of the state, or start afresh"
                )
            part.load_state_dict(saved[name])

    def _problem(self, directory: Path) -> str | None:
        """Return what is wrong with a checkpoint, the same on all ranks; the files are shared out among them."""
        manifest = read_manifest(directory)
        problem = self._quick_problem(directory)
        if problem is None and manifest is not None and self.verify_hash:
            problem = content_problem(directory, manifest, self.rank, self.world_size)
        agreed = first_problem(problem)
        return None if agreed is None else agreed.partition(": ")[2]

    def _quick_problem(self, directory: Path) -> str | None:
        manifest = read_manifest(directory)
        if manifest is None:
            return "it has no valid manifest" if directory.is_dir() else "there is no such directory"
        return structure_problem(directory, manifest)

    def close(self) -> None:
        """Finish, and let other jobs use the directory; raises what :meth:`wait` raises."""
        try:
            self.wait()
        finally:
            if self._stager is not None:
                self._stager.close()
                self._stager = None
            self._lock.release()


def _whole_state(part: Any) -> Any:
    state = part.state_dict()
    return part.merge_states(gather(state)) if hasattr(part, "merge_states") else state


def _model_and_optimizer(state: Mapping[str, Any]) -> tuple[nn.Module | None, Optimizer | None]:
    model, optimizer = state.get("model"), state.get("optimizer")
    for name, part, kind in (("model", model, nn.Module), ("optimizer", optimizer, Optimizer)):
        if part is not None and not isinstance(part, kind):
            raise CheckpointError(
                f"state[{name!r}] is a {type(part).__name__}",
                f"give one {kind.__name__} under {name!r}, and each further object with a state_dict a name of its own",
            )
    return model, optimizer
