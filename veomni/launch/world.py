"""From the environment to a process with a device, a process group and a mesh."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from veomni import compat
from veomni.accelerators import Accelerator
from veomni.batch.split import SequenceShard
from veomni.errors import LoopError
from veomni.launch.environment import collective_timeout, detect_environment
from veomni.launch.join import join_or_start
from veomni.launch.signals import ProfileSignal, StopSignal
from veomni.logging import create_logger
from veomni.parallel.mesh import ParallelState, init_process_group, set_parallel_state
from veomni.strategies import Strategy
from veomni.strategies.select import mesh_dims

logger = create_logger(__name__)


class DataParallel(NamedTuple):
    """This process's place among the ranks that read different rows."""

    rank: int
    size: int


class World:
    """The processes of a run, and this one among them; for the arguments see :class:`~veomni.launcher.Launcher`."""

    # Known after launch()
    state: ParallelState
    device: torch.device
    rank: int
    world_size: int
    local_rank: int
    signal: StopSignal
    profile_signal: ProfileSignal

    def __init__(
        self,
        strategies: Sequence[Strategy],
        accelerator: Accelerator,
        *,
        devices: int | None,
        backend: str,
        timeout: timedelta,
    ) -> None:
        self.strategies, self.accelerator, self.devices, self.timeout = strategies, accelerator, devices, timeout
        self.backend = accelerator.backend if backend == "auto" else backend

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in World.__annotations__:
                raise LoopError(f"launcher.{name} is known once processes are joined", "call launcher.launch() first")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def launch(self) -> None:
        """Join the launch this process is part of; or start ``devices`` processes, and exit when they have ended.

        Where environment, strategies and devices contradict each other it is an InputError, and nothing was started.
        """
        given, found, devices = collective_timeout(os.environ), detect_environment(os.environ), self.devices
        if found is None and devices is None:
            devices = self.accelerator.device_count()
        world_size, local = (devices or 1,) * 2 if found is None else (found.world_size, found.local_world_size)
        for strategy in self.strategies:
            strategy.check(world_size)
        dims = mesh_dims(self.strategies, world_size)
        self.accelerator.check_devices(local, shared=self.backend == "gloo")
        place = join_or_start(devices)
        if given is not None:
            self.timeout = given
            logger.info_rank0("collective timeout: %s (NCCL_TIMEOUT)", given)
        self.rank, self.world_size, self.local_rank = place.rank, place.world_size, place.local_rank
        self.device = self.accelerator.device(place.local_rank)
        self.accelerator.set_device(self.device)
        compat.install()
        init_process_group(self.device, self.backend, rank=self.rank, world_size=self.world_size, timeout=self.timeout)
        self.state = ParallelState(dims, self.device.type, timeout=self.timeout)
        set_parallel_state(self.state)
        self.signal, self.profile_signal = StopSignal(), ProfileSignal()

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    @property
    def data_parallel(self) -> DataParallel:
        """This process's place among the ranks that read different rows, for a loader."""
        return DataParallel(self.state.rank("data"), self.state.size("data"))

    @property
    def sequence_shard(self) -> SequenceShard:
        """Which positions of every row this process holds, for a loader that splits rows in its workers."""
        return self.state.sequence_shard

    def barrier(self) -> None:
        """Wait for all ranks; collective."""
        dist.barrier()

    def leave(self) -> None:
        """Put the process back as it was before :meth:`launch`."""
        if "signal" in vars(self):
            self.signal.close()
            self.profile_signal.close()
        compat.uninstall()
        set_parallel_state(None)
