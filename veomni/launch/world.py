"""From the environment to a process with a device, a process group and a mesh."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from veomni import compat
from veomni.accelerators import Accelerator
from veomni.batch.split import SequenceShard
from veomni.errors import LoopError
from veomni.launch.collective_timeout import collective_timeout
from veomni.launch.environment import detect_environment
from veomni.launch.join import join_or_start
from veomni.launch.stop_signal import StopSignal
from veomni.logging import create_logger
from veomni.parallel.mesh import ParallelState, set_parallel_state
from veomni.parallel.processes import init_process_group
from veomni.strategies import Strategy
from veomni.strategies.select import mesh_dims

logger = create_logger(__name__)


@dataclass(frozen=True)
class World:
    """A process among all ranks.

    Attributes:
        state: The mesh.
        accelerator: What runs models.
        device: The device of this process.
        rank: Its place among all ranks.
        world_size: Number of ranks.
        local_rank: Its place among those of its node.
    """

    state: ParallelState
    accelerator: Accelerator
    device: torch.device
    rank: int
    world_size: int
    local_rank: int


def join_world(
    strategies: Sequence[Strategy], accelerator: Accelerator, *, devices: int | None, backend: str, timeout: timedelta
) -> World:
    """Join the launch this process is part of, or start ``devices`` processes and supervise them.

    In the process that people start, this does not return when it has to start others.

    Raises:
        InputError: the environment, the strategies and the devices contradict each other; nothing was started.
    """
    given = collective_timeout(os.environ)
    found = detect_environment(os.environ)
    if found is None and devices is None:
        devices = accelerator.device_count()
    world_size, local = (devices or 1,) * 2 if found is None else (found.world_size, found.local_world_size)
    for strategy in strategies:
        strategy.check(world_size)
    dims = mesh_dims(strategies, world_size)
    accelerator.check_devices(local, shared=backend == "gloo")
    environment = join_or_start(devices)
    if given is not None:
        timeout = given
        logger.info_rank0("collective timeout: %s (NCCL_TIMEOUT)", given)
    device = accelerator.device(environment.local_rank)
    accelerator.set_device(device)
    init_process_group(device, backend, rank=environment.rank, world_size=environment.world_size, timeout=timeout)
    state = ParallelState(dims, device.type, timeout=timeout)
    set_parallel_state(state)
    return World(state, accelerator, device, environment.rank, environment.world_size, environment.local_rank)


class DataParallel(NamedTuple):
    """This process's place among the ranks that read different rows."""

    rank: int
    size: int


class Processes:
    """The processes of a run, and this one among them.

    Args:
        strategies: Decide the mesh.
        accelerator: What runs models.
        devices: Processes on this node; None takes every device, or one process on a CPU.
        backend: Collective backend; "auto" is the accelerator's.
        timeout: How long a collective waits for the other ranks; overridden by ``NCCL_TIMEOUT``.

    Attributes:
        world: This process among all ranks; its attributes are also this object's, once it is launched.
    """

    world: World
    state: ParallelState
    device: torch.device
    rank: int
    world_size: int
    local_rank: int
    signal: StopSignal

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
            if name not in ("world", "state", "device", "rank", "world_size", "local_rank", "signal"):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            if "world" not in vars(self):
                raise LoopError(f"launcher.{name} is known once processes are joined", "call launcher.launch() first")
            return getattr(self.world, name)

    def launch(self) -> None:
        """Join the launch this process is part of, or start ``devices`` processes and supervise them.

        In the process that people start, this does not return when it has to start others.

        Raises:
            InputError: the environment, the strategies and the devices contradict each other; nothing was started.
        """
        self.world = join_world(
            self.strategies, self.accelerator, devices=self.devices, backend=self.backend, timeout=self.timeout
        )
        self.signal = StopSignal()
        compat.install()

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

    @contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Run the body on rank 0, then on the others: for work whose result rank 0 leaves on disk; collective."""
        if not self.is_rank_zero:
            self.barrier()
        yield
        if self.is_rank_zero:
            self.barrier()

    def leave(self) -> None:
        """Put the process back as it was before :meth:`launch`."""
        if "signal" in vars(self):
            self.signal.close()
        compat.uninstall()
        set_parallel_state(None)
