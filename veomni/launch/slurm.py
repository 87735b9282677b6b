"""Slurm's environment: the rank of an ``srun`` task, without asking ``scontrol``.

The variables are described in the "OUTPUT ENVIRONMENT VARIABLES" sections of ``man srun`` and ``man sbatch``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from veomni.errors import LaunchError
from veomni.launch.environment import Environment, integer
from veomni.logging import create_logger

_PORT_BASE, _PORT_RANGE = 10_000, 20_000  # below 32768, where Linux begins to hand out ephemeral ports

logger = create_logger(__name__)


def detect_slurm(env: Mapping[str, str]) -> Environment | None:
    """Return the place of an ``srun`` task among the others; None outside Slurm, or in a shell of its own.

    Raises:
        LaunchError: a variable is missing, malformed, or contradicts another.
    """
    if not env.get("SLURM_PROCID") or not (env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS")):
        return None
    world_size = integer(env, "SLURM_STEP_NUM_TASKS" if env.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS")
    if world_size == 1:
        return None
    if _is_shell(env):
        logger.warning("Slurm gave this job %d tasks, but it runs outside srun: only this node is used", world_size)
        return None
    missing = [name for name in ("SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID") if not env.get(name)]
    if missing:
        raise LaunchError(f"the Slurm environment lacks {', '.join(missing)}", "start the run with srun")
    node_rank = integer(env, "SLURM_NODEID")
    local_world_size = _tasks_on_node(env, node_rank, world_size)
    address = env.get("MASTER_ADDR") or expand_node_list(_node_list(env))[0]
    port = (
        integer(env, "MASTER_PORT")
        if env.get("MASTER_PORT")
        else _PORT_BASE + integer(env, "SLURM_JOB_ID") % _PORT_RANGE
    )
    rank, local_rank = integer(env, "SLURM_PROCID"), integer(env, "SLURM_LOCALID")
    return Environment(rank, local_rank, world_size, local_world_size, node_rank, address, port, "slurm")


def expand_node_list(text: str) -> list[str]:
    """Return the hosts of Slurm's compact notation: ``gpu[08-10,12],login1`` is gpu08, gpu09, gpu10, gpu12, login1.

    Raises:
        LaunchError: the text is not in that notation.
    """
    return [host for item in _split_outside_brackets(text) for host in _expand(item, text)]


def _is_shell(env: Mapping[str, str]) -> bool:
    """Whether this is a batch script or an interactive shell: only srun sets the variables of a step."""
    in_step = any(env.get(name) for name in ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NODELIST"))
    return not in_step and (env.get("ENVIRONMENT") == "BATCH" or env.get("SLURM_JOB_NAME") in ("bash", "interactive"))


def _node_list(env: Mapping[str, str]) -> str:
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    for name in names:
        if env.get(name):
            return env[name]
    raise LaunchError(f"the Slurm environment has none of {', '.join(names)}", "set MASTER_ADDR to the host of rank 0")


def _tasks_on_node(env: Mapping[str, str], node: int, world_size: int) -> int:
    """Read "2(x3),1", tasks per node with repetitions; without it, an even share."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE")
    if not text:
        return _even_share(env, world_size)
    counts: list[int] = []
    for item in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item.strip())
        if not found:
            raise LaunchError(f"Slurm's tasks per node read {text!r}", "expected a form like 2(x3),1")
        counts += [int(found[1])] * int(found[2] or 1)
    if node >= len(counts):
        raise LaunchError(
            f"SLURM_NODEID={node} but Slurm's tasks per node ({text}) name {len(counts)} nodes", "start with srun"
        )
    return counts[node]


def _even_share(env: Mapping[str, str], world_size: int) -> int:
    nodes = len(expand_node_list(_node_list(env)))
    if world_size % nodes:
        raise LaunchError(
            f"{world_size} Slurm tasks do not divide over {nodes} nodes and SLURM_TASKS_PER_NODE is not set",
            "give srun --ntasks-per-node",
        )
    return world_size // nodes


def _split_outside_brackets(text: str) -> list[str]:
    return [item for item in re.split(r",(?![^\[]*\])", text.strip()) if item]


def _expand(item: str, whole: str) -> list[str]:
    found = re.fullmatch(r"([^\[\]]*)(?:\[([^\[\]]+)\](.*))?", item)
    if not found or not item:
        raise LaunchError(f"Slurm's node list {whole!r} cannot be read", "set MASTER_ADDR to the host of rank 0")
    prefix, ranges, rest = found.groups()
    if ranges is None:
        return [prefix]
    tails = _expand(rest, whole) if rest else [""]
    return [
        f"{prefix}{number}{tail}" for part in ranges.split(",") for number in _numbers(part, whole) for tail in tails
    ]


def _numbers(part: str, whole: str) -> list[str]:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
    if not found:
        raise LaunchError(f"Slurm's node list {whole!r} cannot be read", "set MASTER_ADDR to the host of rank 0")
    first, last = found[1], found[2] or found[1]
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
