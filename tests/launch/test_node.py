"""``train.sh``: the ranks of one node and of two, with our exit codes, signals and time limits."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.conftest import Program, is_running, wait_until
from veomni.errors import LaunchError
from veomni.launch import Environment
from veomni.launch.node import first_of_node, processes_per_node
from veomni.testing.ranks import free_port

Start = Callable[..., Program]
TRAIN = ["bash", str(Path(__file__).parents[2] / "train.sh")]
COMMON = {"PYTHON": sys.executable, "NPROC_PER_NODE": "2"}
BODY = """
    @entrypoint
    def main():
        place = join_or_start(None)
        with StopSignal() as stop:
            note(f"pid{place.rank}", os.getpid())
            if sys.argv[1] == "bad":
                raise ConfigError("key is 3", "make it 4")
            while not stop.requested or "ignore" in sys.argv:
                time.sleep(0.01)
        sys.exit(75)

    main()
"""
MEET = """
    import torch, torch.distributed as dist

    @entrypoint
    def main():
        place = join_or_start(None)
        dist.init_process_group("gloo")
        total = torch.tensor(place.rank + 1)
        dist.all_reduce(total)
        note(f"met{place.rank}", f"{place.kind} {place.node_rank} {place.local_rank} {place.world_size} {int(total)}")

    main()
"""


@pytest.mark.parametrize(
    ("env", "first"),
    [
        ({"NPROC_PER_NODE": "3", "MASTER_ADDR": "elsewhere"}, Environment(0, 0, 3, 3, 0, "127.0.0.1", 0, "child")),
        ({"NPROC_PER_NODE": "1", "MASTER_PORT": "7"}, Environment(0, 0, 1, 1, 0, "127.0.0.1", 7, "child")),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0", "NPROC_PER_NODE": "8"},
            Environment(8, 0, 16, 8, 1, "node0", 29500, "child"),
        ),
    ],
    ids=["one node meets on any port", "one node on a port", "several nodes meet at the master"],
)
def test_the_first_rank_of_a_node(env: dict[str, str], first: Environment) -> None:
    assert first_of_node(env) == first


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"NNODES": "2", "MASTER_ADDR": "h"}, "NODE_RANK is not set"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is not set"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "h"}, "NODE_RANK=2"),
        ({"NNODES": "0"}, "NNODES is 0"),
        ({"NNODES": "two"}, "NNODES is 'two'"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1 but NNODES=1"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE is 0"),
        ({"NPROC_PER_NODE": "gpu"}, "NPROC_PER_NODE"),
    ],
)
def test_contradictions_are_rejected(env: dict[str, str], named: str) -> None:
    with pytest.raises(LaunchError, match=named):
        first_of_node({"NPROC_PER_NODE": "1", **env})


@pytest.mark.parametrize(
    ("env", "processes"),
    [
        ({"NPROC_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "0"}, 4),
        ({"CUDA_VISIBLE_DEVICES": "0,3,5"}, 3),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8d,GPU-9e"}, 2),
        ({"ASCEND_RT_VISIBLE_DEVICES": "0,1,2,3"}, 4),
        ({"HIP_VISIBLE_DEVICES": "1"}, 1),
    ],
)
def test_processes_follow_the_visible_devices(env: dict[str, str], processes: int) -> None:
    assert processes_per_node(env) == processes


def test_two_nodes_meet(start: Start, tmp_path: Path) -> None:
    common = {
        **COMMON,
        "NPROC_PER_NODE": "1",
        "NNODES": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    nodes = []
    for rank in range(2):
        nodes.append(start(MEET, command=TRAIN, LOG_FILE=str(tmp_path / f"log{rank}"), **common, NODE_RANK=str(rank)))
    assert [node.wait(60) for node in nodes] == [0, 0], "".join(node.output for node in nodes)
    assert {nodes[0].note(f"met{rank}") for rank in range(2)} == {"child 0 0 2 3", "child 1 0 2 3"}


def test_bad_input_is_said_once_and_logged(start: Start, tmp_path: Path) -> None:
    log = tmp_path / "log file"
    program = start(BODY, "bad", command=TRAIN, LOG_FILE=str(log), **COMMON)
    assert program.wait() == 78
    wait_until(lambda: "fix: make it 4" in log.read_text())
    assert log.read_text().count("error: key is 3") == 1
    assert "Traceback" not in log.read_text()


def test_sigterm_lets_the_ranks_save(start: Start) -> None:
    program = start(BODY, "wait", command=TRAIN, **COMMON)
    pids = program.pids(2)
    program.send(signal.SIGTERM)
    assert program.wait() == 75, program.output
    assert not any(is_running(pid) for pid in pids)


def test_a_killed_rank_ends_one_that_ignores_signals_in_time(start: Start) -> None:
    program = start(BODY, "wait", "ignore", command=TRAIN, **COMMON)
    program.end_by_killing(rank=1)


def test_a_killed_supervisor_leaves_no_rank(start: Start) -> None:
    program = start(BODY, "wait", "ignore", command=TRAIN, **COMMON)
    pids = program.pids(2)
    program.send(signal.SIGKILL)
    wait_until(lambda: not any(is_running(pid) for pid in pids), 10)


def test_plain_torchrun_is_joined_and_bad_input_said_once(start: Start) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = start(
        """
        @entrypoint
        def main():
            place = join_or_start(None)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun must not silence the slower one
            note(f"pid{place.rank}", os.getpid())
            while not Path(os.environ["NOTES"], f"pid{1 - place.rank}").exists():
                time.sleep(0.001)
            raise ConfigError("key is 3", "make it 4")

        main()
        """,
        command=command,
    )
    assert program.wait() == 1
    assert program.output.count("error: key is 3") == 1


def test_a_script_must_be_named(start: Start) -> None:
    program = start("", command=["bash", "-c", f"exec bash {TRAIN[1]}"], **COMMON)
    assert program.wait() == 78
    assert "bash train.sh FILE CONFIG" in program.output
