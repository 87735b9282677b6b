"""Join the ranks that a cluster started, or start them here."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from veomni.errors import LaunchError
from veomni.launch import failure
from veomni.launch.command import own_command, threads_per_rank, tied_to_this_process
from veomni.launch.environment import CHILD_VARIABLE, SINGLE, Environment, detect_environment
from veomni.launch.rank_process import RankProcess
from veomni.launch.supervisor import Supervisor, announce, collected_signals
from veomni.logging import create_logger

logger = create_logger(__name__)


def join_or_start(devices: int | None) -> Environment:
    """Return this process's place among the ranks, having started them if nothing else has.

    Under torchrun or srun, joins. Started by hand with ``devices`` above one, becomes the supervisor: runs this program
    again that many times, one rank each, and never returns, but exits with the run's code. The variables that
    ``torch.distributed``'s ``env://`` rendezvous reads are set whenever there are several ranks.

    Args:
        devices: Processes on this node; None takes what the environment says, or one.

    Raises:
        LaunchError: the environment is incomplete or contradicts ``devices``, or this program cannot be run again.
    """
    if devices is not None and devices < 1:
        raise LaunchError(f"devices is {devices}", "ask for at least one", field="Launcher.devices")
    environment = detect_environment(os.environ)
    if environment is not None:
        return _join(environment, devices)
    if devices is None or devices == 1:
        return SINGLE
    sys.exit(_supervise(devices))


def _join(environment: Environment, devices: int | None) -> Environment:
    if devices is not None and devices != environment.local_world_size:
        raise LaunchError(
            f"devices is {devices} but {environment.local_world_size} {environment.kind} processes run here",
            f"leave devices out, or start {devices} processes per node",
            field="Launcher.devices",
        )
    environment.export(os.environ)
    return environment


def _supervise(devices: int) -> int:
    if threading.current_thread() is not threading.main_thread():
        raise LaunchError("several processes cannot be started from a thread", "call launch from the main thread")
    command = tied_to_this_process(own_command())
    with collected_signals() as signals, failure.directory() as failures, _held_port() as port:
        first = replace(SINGLE, world_size=devices, local_world_size=devices, master_port=port, kind="child")
        logger.info("starting %d ranks on this node", devices)
        ranks: list[RankProcess] = []
        try:
            for rank in range(devices):
                environment = replace(first, rank=rank, local_rank=rank)
                ranks.append(RankProcess(rank, command, _variables(environment, failures), failures))
        except OSError as error:
            for started in ranks:
                started.kill()
            raise LaunchError(
                f"rank {len(ranks)} of {devices} cannot be started: {error}", "free memory or processes"
            ) from error
        verdict = Supervisor(ranks, signals).run()
    announce(verdict)
    return verdict.exit_code


def _variables(environment: Environment, failures: Path) -> dict[str, str]:
    variables = dict(os.environ)
    environment.export(variables)
    variables[CHILD_VARIABLE] = "1"
    variables.update(failure.variables(failures))
    variables.setdefault("OMP_NUM_THREADS", str(threads_per_rank(environment.local_world_size)))
    return variables


@contextlib.contextmanager
def _held_port() -> Iterator[int]:
    """Reserve a port for rank 0's store.

    Linux lets rank 0 listen on it while this socket stays bound without listening, and gives it to no process that asks
    for any free port. Elsewhere the port is only known to have been free.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        port = int(holder.getsockname()[1])
        if sys.platform != "linux":
            holder.close()
        yield port
