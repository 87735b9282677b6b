"""Save and load the whole state of a run on any layout; a kill at any moment costs at most the save in hand."""

import shutil
import uuid
from collections import ChainMap
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from filelock import FileLock
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from veomni.checkpoint import directories, objects, sharded_state
from veomni.checkpoint.directories import write_durably
from veomni.checkpoint.manifest import content_problem, describe_file, read_manifest, structure_problem, write_manifest
from veomni.checkpoint.sharded_state import WEIGHTS
from veomni.errors import CheckpointError, VeOmniError
from veomni.logging import create_logger
from veomni.version import __version__

_SHARDED = ("model", "optimizer")
_PER_RANK = ("rng",)
"""Names of states that every rank has its own of."""

logger = create_logger(__name__)


class SaveFailedError(VeOmniError):
    """A checkpoint could not be written; nothing was published and earlier ones are intact."""


class Checkpointer:
    """Write and read ``<directory>/global_step_N``.

    A checkpoint is written under a temporary name, every rank hashes its files, rank 0 seals them with a manifest and
    renames the directory; it is never written over. All methods are collective. For the arguments see
    ``CheckpointSchedule``; ``async_save`` copies the state to host memory, and writes it on a gloo group of its own.
    A directory that another job uses is a CheckpointError.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int = 2,
        async_save: bool = False,
        verify_hash: bool = True,
        signature: Mapping[str, Any] | None = None,
    ) -> None:
        if keep_last < 2:
            raise CheckpointError(f"keep_last is {keep_last}", "keep at least 2 checkpoints")
        self.directory, self.keep_last, self.verify_hash = Path(directory), keep_last, verify_hash
        joined = dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        self._async, self._signature = async_save, dict(signature or {})
        self._group = dist.new_group(backend="gloo") if async_save and self.world_size > 1 else None
        self._pending: Future[None] | None = None
        self._lock = self._take_directory()

    def _take_directory(self) -> FileLock | None:
        lock = failure = None
        try:
            if self.rank == 0:
                lock = directories.lock_directory(self.directory)
        except CheckpointError as error:
            failure = error
        if failure := self._first_problem(failure):
            raise failure
        if self.rank == 0 and (left := directories.remove_leftovers(self.directory)):
            logger.warning("removed what an interrupted save left: %s", ", ".join(sorted(left)))
        return lock

    def _gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=group)
        return values

    def _first_problem(self, problem: Any | None, group: dist.ProcessGroup | None = None) -> Any | None:
        return next((found for found in self._gather(problem, group) if found is not None), None)

    def _path(self, step: int) -> Path:
        return self.directory / f"global_step_{step}"

    def save(self, state: Mapping[str, Any], step: int) -> None:
        """Save ``state`` as the checkpoint of ``step``; a valid one there is kept, a damaged one renamed.

        It is "model", "optimizer", and anything with a ``state_dict``; where each rank holds a part of it, the object
        has a ``merge_states`` that makes one state of all ranks' in order. Where some rank could not write, also in the
        background save before this one, all raise a SaveFailedError.
        """
        self.wait()
        final = self._path(step)
        if self._gather(final.exists())[0]:
            damage = self._problem(final)
            if damage is None:
                logger.warning_rank0("%s is there already and stays: step %s is not saved", final, step)
                return
            with self._together(step):
                if self.rank == 0:  # a run fell back from it, and has now come past
                    aside = final.rename(f"{final}.damaged-{uuid.uuid4().hex}")  # for people to look at
                    logger.warning("%s is damaged (%s): it is kept as %s", final, damage, aside)
        table = sharded_state.sharded_state(*_model_and_optimizer(state))
        others = {name: self._whole_state(part) for name, part in state.items() if name not in _SHARDED}
        with self._together(step):
            contents = self._encoded(others)
        temporary = final.with_name(f"{final.name}.tmp-{self._gather(uuid.uuid4().hex[:12])[0]}")
        if not self._async:
            self._write(table, contents, temporary, step)
            return
        executor = ThreadPoolExecutor(1, "checkpoint")
        self._pending = executor.submit(self._write, sharded_state.in_host_memory(table), contents, temporary, step)
        executor.shutdown(wait=False)

    def wait(self) -> None:
        """Finish a save in the background; SaveFailedError when it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    @contextmanager
    def _together(self, step: int, temporary: Path | None = None) -> Iterator[None]:
        """Run a part of a save; when it fails on one rank, raise on all of them and remove ``temporary``."""
        problem = None
        try:
            yield
        except (Exception, CheckpointException) as error:  # PyTorch's is a BaseException
            problem = sharded_state.own_cause(error, self.rank)
        problem = self._first_problem(problem, self._group)
        if problem is None:
            return
        if self.rank == 0 and temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise SaveFailedError(f"the checkpoint of step {step} was not written ({problem}); earlier ones are intact")

    def _whole_state(self, part: Any) -> Any:
        state = part.state_dict()
        return part.merge_states(self._gather(state)) if hasattr(part, "merge_states") else state

    def _encoded(self, states: Mapping[str, Any]) -> dict[str, bytes]:
        """Return the contents of this rank's files, by name."""
        parts = {f"rank_{self.rank}": {name: part for name, part in states.items() if name in _PER_RANK}}
        if self.rank == 0:
            parts["shared"] = {name: part for name, part in states.items() if name not in _PER_RANK}
        return {stem + suffix: text for stem, part in parts.items() for suffix, text in objects.encoded(part).items()}

    def _write(self, table: dict[str, Any], contents: Mapping[str, bytes], temporary: Path, step: int) -> None:
        with self._together(step, temporary):
            if self.rank == 0:
                (temporary / WEIGHTS).mkdir(parents=True)
        with self._together(step, temporary):
            sharded_state.save_table(table, temporary / WEIGHTS, self._group)
            for name, content in contents.items():
                write_durably(temporary / name, content)
            metadata = [f"{WEIGHTS}/.metadata"] if self.rank == 0 else []
            shards = [f"{WEIGHTS}/{path.name}" for path in (temporary / WEIGHTS).glob(f"__{self.rank}_*")]
            files = {name: describe_file(temporary / name) for name in (*contents, *metadata, *shards)}
        described = self._gather(files, self._group)
        with self._together(step, temporary):
            if self.rank == 0:
                self._publish(dict(ChainMap(*described)), temporary, step)

    def _publish(self, files: Mapping[str, Any], temporary: Path, step: int) -> None:
        versions = {"veomni": __version__, "torch": str(torch.__version__)}
        facts = {"step": step, "world_size": self.world_size, "signature": self._signature, **versions}
        write_manifest(temporary, files, facts)
        directories.sync_directory(temporary)
        final = temporary.rename(self._path(step))
        logger.info("saved %s", final)
        try:
            directories.sync_directory(self.directory)
            valid = [step for step in self.steps() if structure_problem(self._path(step)) is None]
            for expired in valid[self.keep_last :]:
                directories.retire(self._path(expired))
        except OSError as error:  # the checkpoint is there: this is no failed save
            logger.warning("%s is saved, but tidying up after it failed: %s", final, error)

    def steps(self) -> list[int]:
        """Return the steps that have a published checkpoint, newest first."""
        return directories.published_steps(self.directory)

    def check_none_newer(self, step: int) -> None:
        """Check that no checkpoint is of a later step: an abandoned run's would stay, and ``load_latest`` take it."""
        newer = [found for found in self._gather(self.steps())[0] if found > step]
        if newer:
            problem = f"{self._path(newer[0])} is newer than step {step}, where this run starts"
            fix = "give another directory, move the newer checkpoints away, or use resume: auto"
            raise CheckpointError(problem, fix)

    def load_latest(self, state: Mapping[str, Any]) -> int | None:
        """Load the newest checkpoint whose manifest verifies, and return its step; None when there is none."""
        self.wait()
        for step in self._gather(self.steps())[0]:
            directory = self._path(step)
            problem = self._problem(directory)
            if problem is None:
                return self._load(state, directory)
            logger.warning_rank0("%s is damaged (%s): falling back to an older checkpoint", directory, problem)
        return None

    def load(self, state: Mapping[str, Any], path: Path) -> int:
        """Load one checkpoint, and return its step; CheckpointError when it is missing or damaged, or does not fit."""
        self.wait()
        problem = self._problem(path)
        if problem is not None:
            raise CheckpointError(f"checkpoint {path}: {problem}", "give another one, or resume: auto")
        return self._load(state, path)

    def _load(self, state: Mapping[str, Any], path: Path) -> int:
        manifest = read_manifest(path)
        assert manifest is not None
        if manifest["signature"] != self._signature:
            problem = f"{path} was saved with {manifest['signature']}, this run has {self._signature}"
            raise CheckpointError(problem, "make them equal")
        model, optimizer = _model_and_optimizer(state)
        table = sharded_state.sharded_state(model, optimizer)
        sharded_state.load_table(table, path / WEIGHTS)
        sharded_state.restore(model, optimizer, table)
        self._load_objects(state, path, manifest["world_size"])
        logger.info_rank0("resumed from %s", path)
        return int(manifest["step"])

    def _load_objects(self, state: Mapping[str, Any], path: Path, world_size: int) -> None:
        saved = objects.read_objects(path / "shared")
        if world_size == self.world_size:
            saved |= objects.read_objects(path / f"rank_{self.rank}")
        else:
            renewed = ", ".join(_PER_RANK)
            logger.info_rank0("world size changed from %s to %s: %s re-seeded", world_size, self.world_size, renewed)
        for name, part in state.items():
            if name in saved:
                part.load_state_dict(saved[name])
            elif name not in (*_SHARDED, *_PER_RANK):
                problem = f"{path} holds no state of {name!r}"
                raise CheckpointError(problem, "leave it out of the state, or start afresh")

    def _problem(self, directory: Path) -> str | None:
        """Return what is wrong with a checkpoint, the same on all ranks, which share out the files."""
        if self.verify_hash:
            return self._first_problem(content_problem(directory, self.rank, self.world_size))
        return self._first_problem(structure_problem(directory))

    def close(self) -> None:
        """Finish, and let other jobs use the directory; raises what :meth:`wait` raises."""
        try:
            self.wait()
        finally:
            if self._lock is not None:
                self._lock.release()


def _model_and_optimizer(state: Mapping[str, Any]) -> tuple[nn.Module | None, Optimizer | None]:
    model, optimizer = state.get("model"), state.get("optimizer")
    for name, part, kind in (("model", model, nn.Module), ("optimizer", optimizer, Optimizer)):
        if part is not None and not isinstance(part, kind):
            fix = f"give one {kind.__name__} under {name!r}, and other objects with a state_dict names of their own"
            raise CheckpointError(f"state[{name!r}] is a {type(part).__name__}", fix)
    return model, optimizer
