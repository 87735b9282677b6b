"""What ``train.sh`` runs: the ranks of this node, alone or as one of several nodes that run the same command."""

import os
import sys
from collections.abc import Mapping

from veomni.errors import LaunchError
from veomni.launch.entrypoint import entrypoint
from veomni.launch.environment import Environment, collective_timeout, integer
from veomni.launch.supervisor import supervise

_DEVICE_LISTS = ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def first_of_node(env: Mapping[str, str]) -> Environment:
    """Return the place of this node's first rank, from NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, NPROC_PER_NODE."""
    nodes, node = integer(env, "NNODES", "1", least=1), integer(env, "NODE_RANK", "0")
    if node >= nodes:
        raise LaunchError(f"NODE_RANK={node} but NNODES={nodes}", "give every node its own NODE_RANK below NNODES")
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if not env.get(name)]
    if nodes > 1 and missing:
        raise LaunchError(f"NNODES={nodes} but {', '.join(missing)} is not set", "set it on every node")
    several = nodes > 1 or env.get("MASTER_PORT")
    port = integer(env, "MASTER_PORT", "29500", least=1) if several else 0
    address = (env.get("MASTER_ADDR") if several else "") or "127.0.0.1"
    here = processes_per_node(env)
    return Environment(node * here, 0, nodes * here, here, node, address, port, "child")


def processes_per_node(env: Mapping[str, str]) -> int:
    """Return NPROC_PER_NODE, else the length of a list of visible devices, else the accelerators found, else one."""
    if env.get("NPROC_PER_NODE"):
        return integer(env, "NPROC_PER_NODE", least=1)
    for name in _DEVICE_LISTS:
        devices = [item for item in env.get(name, "").split(",") if item.strip() not in ("", "-1")]
        if devices:
            return len(devices)
    from veomni.accelerators import CPU, select_accelerator

    accelerator = select_accelerator("auto")
    return 1 if isinstance(accelerator, CPU) else accelerator.device_count()


@entrypoint
def main() -> None:
    """Run ``FILE ARGS...`` once per process of this node; exit with 0, 70, 75 or 78."""
    if len(sys.argv) < 2:
        raise LaunchError("no training script is named", "bash train.sh FILE CONFIG [--key value ...]")
    collective_timeout(os.environ)  # rejected here, before any rank is started
    sys.exit(supervise(first_of_node(os.environ), [sys.executable, *sys.argv[1:]]))


if __name__ == "__main__":
    main()
