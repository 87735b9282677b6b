"""Which rank this process is, as torchrun, Slurm or our own supervisor say it in environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Literal

from veomni.errors import LaunchError

Kind = Literal["single", "torchrun", "slurm", "child"]

# Set by nothing but a launcher of ranks. MASTER_* alone is no launch: clusters export it for `train.sh` to read.
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_ADDRESS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
CHILD_VARIABLE = "VEOMNI_CHILD"


@dataclass(frozen=True)
class Environment:
    """One process's place among all.

    Attributes:
        rank: Position among all processes.
        local_rank: Position among this node's processes.
        world_size: Processes altogether.
        local_world_size: Processes on this node.
        node_rank: Position of this node among all.
        master_addr: Host of rank 0.
        master_port: TCP port of the rendezvous store on that host; 0 in a single process: any free port will do.
        kind: What started the process: nothing ("single"), torchrun or what sets its variables, Slurm's srun,
            or :func:`veomni.launch.join_or_start` ("child").
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node_rank: int
    master_addr: str
    master_port: int
    kind: Kind

    def __post_init__(self) -> None:
        for name, size_name in (
            ("rank", "world_size"),
            ("local_rank", "local_world_size"),
            ("local_world_size", "world_size"),
        ):
            value, size = getattr(self, name), getattr(self, size_name)
            limit = size if name == "local_world_size" else size - 1
            if not 0 <= value <= limit:
                raise LaunchError(
                    f"the {self.kind} environment says {name.upper()}={value} but {size_name.upper()}={size}",
                    "start every process with torchrun or srun, which set these together",
                )

    def export(self, variables: MutableMapping[str, str]) -> None:
        """Write the variables that ``torch.distributed``'s ``env://`` rendezvous and the loggers read."""
        variables.update(
            RANK=str(self.rank),
            LOCAL_RANK=str(self.local_rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_WORLD_SIZE=str(self.local_world_size),
            MASTER_ADDR=self.master_addr,
            MASTER_PORT=str(self.master_port),
        )


SINGLE = Environment(0, 0, 1, 1, 0, "127.0.0.1", 0, "single")


def detect_environment(env: Mapping[str, str] | None = None) -> Environment | None:
    """Return this process's place as its launcher set it, or None if it was started by hand.

    Args:
        env: Environment variables, by default this process's. torchrun's go before Slurm's: it runs inside Slurm jobs.

    Raises:
        LaunchError: the variables are incomplete, not integers, or contradict each other.
    """
    from veomni.launch.slurm import detect_slurm

    env = os.environ if env is None else env
    if any(env.get(name) for name in _RANK_VARIABLES):
        return _from_torchrun(env)
    return detect_slurm(env)


def integer(env: Mapping[str, str], name: str) -> int:
    """Return the variable ``name`` as a non-negative integer.

    Raises:
        LaunchError: it is something else.
    """
    text = env[name].strip()
    if not text.isascii() or not text.isdigit():
        raise LaunchError(
            f"the environment variable {name} is {env[name]!r}, not a whole number", f"unset or correct {name}"
        )
    return int(text)


def _from_torchrun(env: Mapping[str, str]) -> Environment:
    missing = [name for name in (*_RANK_VARIABLES, *_ADDRESS_VARIABLES) if not env.get(name)]
    if missing:
        present = [name for name in _RANK_VARIABLES if env.get(name)]
        raise LaunchError(
            f"the environment sets {', '.join(present)} but not {', '.join(missing)}",
            "start with torchrun or train.sh, which set all of them, or unset them to start a run by hand",
        )
    rank, local_rank = integer(env, "RANK"), integer(env, "LOCAL_RANK")
    world_size = integer(env, "WORLD_SIZE")
    local_world_size = _local_world_size(env, rank, local_rank, world_size)
    node_variable = next((name for name in ("GROUP_RANK", "NODE_RANK") if env.get(name)), None)
    node_rank = integer(env, node_variable) if node_variable else rank // max(1, local_world_size)
    kind: Kind = "child" if env.get(CHILD_VARIABLE) else "torchrun"
    port = integer(env, "MASTER_PORT")
    return Environment(rank, local_rank, world_size, local_world_size, node_rank, env["MASTER_ADDR"], port, kind)


def _local_world_size(env: Mapping[str, str], rank: int, local_rank: int, world_size: int) -> int:
    if env.get("LOCAL_WORLD_SIZE"):
        return integer(env, "LOCAL_WORLD_SIZE")
    if rank == local_rank:  # one node, as far as this process can see; another node's ranks end in the error below
        return world_size
    raise LaunchError(
        "the environment spans several nodes but LOCAL_WORLD_SIZE is not set", "set it to the processes per node"
    )
