"""From the environment to a process with a device, a process group and a mesh."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch

from veomni.accelerators import Accelerator
from veomni.launch.collective_timeout import collective_timeout
from veomni.launch.environment import detect_environment
from veomni.launch.join import join_or_start
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
