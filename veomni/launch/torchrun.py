"""What ``train.sh`` runs: torchrun, with the exit codes and signals of this package.

torchrun alone turns every failure into exit code 1, and kills ranks that are still saving 30 s after a SIGTERM. Here
signals go straight to the ranks, which save and end; what they leave behind makes the exit code.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from types import FrameType

from veomni.errors import EXIT_FAULT, LaunchError
from veomni.launch import failure
from veomni.launch.collective_timeout import collective_timeout
from veomni.launch.command import threads_per_rank, tied_to_this_process
from veomni.launch.entrypoint import entrypoint
from veomni.launch.environment import integer
from veomni.launch.supervisor import FORWARDED, URGENT, announce
from veomni.launch.verdict import Verdict, judge
from veomni.launch.watch import RankWatch

_DEFAULT_PORT = "29500"  # torchrun's own
_DEVICE_LISTS = ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def torchrun_arguments(env: Mapping[str, str], program: list[str]) -> list[str]:
    """Return torchrun's arguments: NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, NPROC_PER_NODE, then ``program``.

    Raises:
        LaunchError: one is missing, is not a number, or contradicts another.
    """
    nodes = _positive(env, "NNODES", "1")
    node_rank = integer(env, "NODE_RANK") if env.get("NODE_RANK") else 0
    if node_rank >= nodes:
        raise LaunchError(f"NODE_RANK={node_rank} but NNODES={nodes}", "give every node its own NODE_RANK below NNODES")
    if nodes > 1:
        missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if not env.get(name)]
        if missing:
            raise LaunchError(f"NNODES={nodes} but {', '.join(missing)} is not set", "set it on every node")
    if nodes > 1 or env.get("MASTER_PORT"):
        address = env.get("MASTER_ADDR") or "127.0.0.1"
        rendezvous = [f"--nnodes={nodes}", f"--node-rank={node_rank}", f"--master-addr={address}"]
        rendezvous.append(f"--master-port={_positive(env, 'MASTER_PORT', _DEFAULT_PORT)}")
    else:
        rendezvous = ["--standalone"]
    return [
        *rendezvous,
        f"--nproc-per-node={processes_per_node(env)}",
        "--signals-to-handle=SIGQUIT",
        "--no-python",
        *program,
    ]


def processes_per_node(env: Mapping[str, str]) -> int:
    """Return NPROC_PER_NODE, else the length of a list of visible devices, else the accelerators found, else one.

    Raises:
        LaunchError: NPROC_PER_NODE is not a positive number.
    """
    if env.get("NPROC_PER_NODE"):
        return _positive(env, "NPROC_PER_NODE", "1")
    for name in _DEVICE_LISTS:
        devices = [item for item in env.get(name, "").split(",") if item.strip() not in ("", "-1")]
        if devices:
            return len(devices)
    from veomni.accelerators import CPU, select_accelerator

    accelerator = select_accelerator("auto")
    return 1 if isinstance(accelerator, CPU) else accelerator.device_count()


def _positive(env: Mapping[str, str], name: str, default: str) -> int:
    value = integer({name: env.get(name) or default}, name)
    if value < 1:
        raise LaunchError(f"{name} is {value}", f"set {name} to at least 1, or unset it")
    return value


def _pass_signals_on(watch: RankWatch) -> None:
    """Hand signals to the ranks; a second urgent one kills them, and one that finds no rank ends this process."""
    asked_to_stop = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked_to_stop
        again = number in URGENT and asked_to_stop
        asked_to_stop |= number in URGENT
        if not watch.signal(signal.SIGKILL if again else signal.Signals(number)):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handle)


def _run(arguments: list[str], watch: RankWatch) -> Verdict:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        verdict = judge(watch.ends())
        return verdict if verdict.exit_code else Verdict(EXIT_FAULT, f"run failed: {error}")
    return Verdict(0, "")


@entrypoint
def main() -> None:
    """Run ``FILE ARGS...`` under torchrun; exit with 0, 70, 75 or 78."""
    if len(sys.argv) < 2:
        raise LaunchError("no training script is named", "bash train.sh FILE CONFIG [--key value ...]")
    collective_timeout(os.environ)  # rejected here, before torchrun starts anything
    arguments = torchrun_arguments(os.environ, tied_to_this_process([sys.executable, *sys.argv[1:]]))
    with failure.directory() as failures:
        os.environ.update(failure.variables(failures))
        os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(processes_per_node(os.environ))))
        watch = RankWatch(failures, processes_per_node(os.environ))
        _pass_signals_on(watch)
        verdict = _run(arguments, watch)
    announce(verdict)
    sys.exit(verdict.exit_code)


if __name__ == "__main__":
    main()
