"""Which rank this process is, according to the environment variables of torchrun, Slurm or our own supervisor."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from veomni.errors import LaunchError

# Set by nothing but a launcher of ranks. MASTER_* alone is no launch: clusters export it for `train.sh` to read.
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SUPERVISOR_VARIABLE = "VEOMNI_SUPERVISOR_PID"
_LONGEST_TIMEOUT = 366 * 24 * 3600


@dataclass(frozen=True)
class Environment:
    """One process's place among all, and what started it; ``master_port`` of 0 is any free port on rank 0's host."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node_rank: int
    master_addr: str
    master_port: int
    kind: Literal["single", "torchrun", "slurm", "child"]

    def __post_init__(self) -> None:
        for name, size_name, highest in (
            ("rank", "world_size", self.world_size - 1),
            ("local_rank", "local_world_size", self.local_world_size - 1),
            ("local_world_size", "world_size", self.world_size),
        ):
            value, size = getattr(self, name), getattr(self, size_name)
            if not 0 <= value <= highest:
                problem = f"the {self.kind} environment has {name.upper()}={value} but {size_name.upper()}={size}"
                raise LaunchError(problem, "start every process with torchrun or srun, which set these together")

    def variables(self) -> dict[str, str]:
        """Return the variables that ``torch.distributed``'s ``env://`` rendezvous and the loggers read."""
        return {name.upper(): str(value) for name, value in vars(self).items() if name not in ("node_rank", "kind")}


SINGLE = Environment(0, 0, 1, 1, 0, "127.0.0.1", 0, "single")


def detect_environment(env: Mapping[str, str] | None = None) -> Environment | None:
    """Return the place that torchrun, else Slurm, has set in ``env`` (this process's by default); None without them."""
    from veomni.launch.slurm import detect_slurm

    env = os.environ if env is None else env
    if any(env.get(name) for name in _RANK_VARIABLES):  # torchrun runs inside Slurm jobs
        return _from_torchrun(env)
    return detect_slurm(env)


def integer(env: Mapping[str, str], name: str, default: str = "", *, least: int = 0) -> int:
    """Return the variable ``name``, or ``default`` where it is unset or empty, as an integer of at least ``least``."""
    text = (env.get(name) or default).strip()
    if not text.isascii() or not text.isdigit():
        problem = f"the environment variable {name} is {env.get(name)!r}, not a whole number"
        raise LaunchError(problem, f"unset or correct {name}")
    if int(text) < least:
        raise LaunchError(f"{name} is {text}", f"set {name} to at least {least}, or unset it")
    return int(text)


def collective_timeout(env: Mapping[str, str]) -> timedelta | None:
    """Return ``NCCL_TIMEOUT``, which holds for every backend and overrides the configuration; None when unset."""
    if not env.get("NCCL_TIMEOUT"):
        return None
    seconds = integer(env, "NCCL_TIMEOUT")
    if not 1 <= seconds <= _LONGEST_TIMEOUT:
        raise LaunchError(f"NCCL_TIMEOUT is {seconds}", f"give seconds between 1 and {_LONGEST_TIMEOUT}, or unset it")
    return timedelta(seconds=seconds)


def _from_torchrun(env: Mapping[str, str]) -> Environment:
    missing = [name for name in (*_RANK_VARIABLES, "MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if missing:
        present = ", ".join(name for name in _RANK_VARIABLES if env.get(name))
        fix = "start with torchrun or train.sh, which set all of them, or unset them to start a run by hand"
        raise LaunchError(f"the environment sets {present} but not {', '.join(missing)}", fix)
    rank, local_rank, world_size = (integer(env, name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if not env.get("LOCAL_WORLD_SIZE") and rank != local_rank:
        problem = "the environment spans several nodes but LOCAL_WORLD_SIZE is not set"
        raise LaunchError(problem, "set it to the processes per node")
    local_world_size = integer(env, "LOCAL_WORLD_SIZE", str(world_size))
    node_variable = "GROUP_RANK" if env.get("GROUP_RANK") else "NODE_RANK"
    node_rank = integer(env, node_variable, str(rank // max(1, local_world_size)))
    kind: Literal["child", "torchrun"] = "child" if env.get(SUPERVISOR_VARIABLE) else "torchrun"
    port = integer(env, "MASTER_PORT")
    return Environment(rank, local_rank, world_size, local_world_size, node_rank, env["MASTER_ADDR"], port, kind)
