"""The rank of an ``srun`` task, from the output environment variables in ``man srun`` and ``man sbatch``."""

import itertools
import re
from collections.abc import Mapping

from veomni.errors import LaunchError
from veomni.launch.environment import Environment, integer
from veomni.logging import create_logger

_PORT_BASE, _PORT_RANGE = 10_000, 20_000  # below 32768, where Linux begins to hand out ephemeral ports
_BRACKETS = re.compile(r"\[(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)\]")
_NODE_LISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")

logger = create_logger(__name__)


def detect_slurm(env: Mapping[str, str]) -> Environment | None:
    """Return the place of an ``srun`` task among the others; None outside Slurm, or in a shell of its own."""
    tasks = "SLURM_STEP_NUM_TASKS" if env.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    if not env.get("SLURM_PROCID") or not env.get(tasks) or (world_size := integer(env, tasks)) == 1:
        return None
    # A batch script or an interactive shell: only srun sets the variables of a step.
    in_step = any(env.get(name) for name in ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NODELIST"))
    in_shell = env.get("ENVIRONMENT") == "BATCH" or env.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if in_shell and not in_step:
        logger.warning("Slurm gave this job %d tasks, but it runs outside srun: only this node is used", world_size)
        return None
    missing = [name for name in ("SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID") if not env.get(name)]
    if missing:
        raise LaunchError(f"the Slurm environment lacks {', '.join(missing)}", "start the run with srun")
    node_rank = integer(env, "SLURM_NODEID")
    local_world_size = _tasks_on_node(env, node_rank, world_size)
    address = env.get("MASTER_ADDR") or expand_node_list(_node_list(env))[0]
    port = integer(env, "MASTER_PORT", str(_PORT_BASE + integer(env, "SLURM_JOB_ID") % _PORT_RANGE))
    rank, local_rank = integer(env, "SLURM_PROCID"), integer(env, "SLURM_LOCALID")
    return Environment(rank, local_rank, world_size, local_world_size, node_rank, address, port, "slurm")


def _node_list(env: Mapping[str, str]) -> str:
    found = next((env[name] for name in _NODE_LISTS if env.get(name)), None)
    if found is None:
        problem = f"the Slurm environment has none of {', '.join(_NODE_LISTS)}"
        raise LaunchError(problem, "set MASTER_ADDR to the host of rank 0")
    return found


def _tasks_on_node(env: Mapping[str, str], node: int, world_size: int) -> int:
    """Read "2(x3),1", tasks per node with repetitions; without it, an even share."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE")
    if not text:
        nodes = len(expand_node_list(_node_list(env)))
        if world_size % nodes:
            problem = f"{world_size} Slurm tasks do not divide over {nodes} nodes and SLURM_TASKS_PER_NODE is not set"
            raise LaunchError(problem, "give srun --ntasks-per-node")
        return world_size // nodes
    counts: list[int] = []
    for item in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item.strip())
        if not found:
            raise LaunchError(f"Slurm's tasks per node read {text!r}", "expected a form like 2(x3),1")
        counts += [int(found[1])] * int(found[2] or 1)
    if node >= len(counts):
        problem = f"SLURM_NODEID={node} but Slurm's tasks per node ({text}) name {len(counts)} nodes"
        raise LaunchError(problem, "start with srun")
    return counts[node]


def expand_node_list(text: str) -> list[str]:
    """Return the hosts of Slurm's compact notation: ``gpu[08-10,12],login1`` is gpu08, gpu09, gpu10, gpu12, login1."""
    hosts: list[str] = []
    for item in re.split(r",(?![^\[]*\])", text.strip()):
        parts = _BRACKETS.split(item)  # plain text, with what stands in brackets in between
        numbers = [[n for part in ranges.split(",") for n in _numbers(*part.split("-"))] for ranges in parts[1::2]]
        if not item or any(bracket in "".join(parts[::2]) for bracket in "[]"):
            raise LaunchError(f"Slurm's node list {text!r} cannot be read", "set MASTER_ADDR to the host of rank 0")
        for chosen in itertools.product(*numbers):
            hosts.append("".join(part for pair in zip(parts[::2], (*chosen, ""), strict=True) for part in pair))
    return hosts


def _numbers(first: str, last: str = "") -> list[str]:
    return [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
