"""Slurm's variables, and a fake srun of two real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import clean_environment
from veomni.errors import LaunchError
from veomni.launch import Environment, detect_environment
from veomni.launch.slurm import expand_node_list
from veomni.testing.ranks import free_port

STEP = {
    "SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "6", "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_PROCID": "4", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login1", ["login1"]),
        ("a,b-1", ["a", "b-1"]),
        ("gpu[08-10,12],login1", ["gpu08", "gpu09", "gpu10", "gpu12", "login1"]),
        ("n[1,3-4]", ["n1", "n3", "n4"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("rack[1-2]-node[0-1]", ["rack1-node0", "rack1-node1", "rack2-node0", "rack2-node1"]),
        ("n[1-2].cluster.local", ["n1.cluster.local", "n2.cluster.local"]),
    ],
)
def test_node_lists(text: str, hosts: list[str]) -> None:
    assert expand_node_list(text) == hosts


@pytest.mark.parametrize("text", ["gpu[", "gpu[1-]", "gpu[a-b]", "gpu]1[", "gpu[]"])
def test_node_lists_that_cannot_be_read(text: str) -> None:
    with pytest.raises(LaunchError, match="MASTER_ADDR"):
        expand_node_list(text)


def test_a_task_of_srun() -> None:
    assert detect_environment(STEP) == Environment(4, 1, 6, 3, 1, "gpu07", 10_000 + 1234567 % 20_000, "slurm")
    assert detect_environment({**STEP, "MASTER_ADDR": "ib0", "MASTER_PORT": "7"}) == Environment(
        4, 1, 6, 3, 1, "ib0", 7, "slurm"
    )


@pytest.mark.parametrize(
    ("change", "local_world_size"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "4,2"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "", "SLURM_TASKS_PER_NODE": "1,5"}, 5),
        ({"SLURM_STEP_TASKS_PER_NODE": ""}, 3),
    ],
)
def test_tasks_of_this_node(change: dict[str, str], local_world_size: int) -> None:
    found = detect_environment({**STEP, **change})
    assert found is not None
    assert found.local_world_size == local_world_size


def test_the_job_node_list_serves_where_there_is_none_of_the_step() -> None:
    found = detect_environment({**STEP, "SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": "c[3-4]"})
    assert found is not None
    assert found.master_addr == "c3"


def test_torchrun_inside_slurm_goes_first() -> None:
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    found = detect_environment({**STEP, **torchrun})
    assert found is not None
    assert found.kind == "torchrun"


@pytest.mark.parametrize(
    "env",
    [
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"},
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
        {
            "SLURM_JOB_ID": "1",
            "SLURM_PROCID": "0",
            "SLURM_NTASKS": "8",
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": "1",
        },
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "ENVIRONMENT": "BATCH"},
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NAME": "interactive"},
    ],
    ids=["salloc", "one task", "interactive step", "batch script", "interactive shell"],
)
def test_a_shell_is_no_launch(env: dict[str, str]) -> None:
    assert detect_environment(env) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"SLURM_LOCALID": ""}, "SLURM_LOCALID"),
        ({"SLURM_JOB_ID": ""}, "SLURM_JOB_ID"),
        ({"SLURM_PROCID": "6"}, "RANK=6"),
        ({"SLURM_NODEID": "x"}, "SLURM_NODEID"),
        ({"SLURM_NODEID": "2"}, "SLURM_NODEID=2"),
        ({"SLURM_STEP_TASKS_PER_NODE": "three"}, "three"),
        ({"SLURM_STEP_NODELIST": ""}, "SLURM_JOB_NODELIST"),
        ({"SLURM_STEP_TASKS_PER_NODE": "", "SLURM_STEP_NODELIST": "n[1-4]"}, "6 Slurm tasks"),
    ],
)
def test_contradictions_are_named(change: dict[str, str], named: str) -> None:
    with pytest.raises(LaunchError, match=named):
        detect_environment({**STEP, **change})


def test_two_tasks_of_a_fake_srun_meet(tmp_path: Path) -> None:
    script = tmp_path / "task.py"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "from veomni.launch import entrypoint, join_or_start\n"
        "@entrypoint\n"
        "def main():\n"
        "    place = join_or_start(None)\n"
        "    dist.init_process_group('gloo')\n"
        "    total = torch.tensor(place.rank + 1)\n"
        "    dist.all_reduce(total)\n"
        "    print(place.kind, place.rank, place.world_size, int(total))\n"
        "main()\n"
    )
    common = {
        **STEP,
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NODEID": "0",
        "SLURM_STEP_TASKS_PER_NODE": "2",
    }
    common |= {"SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(free_port())}
    tasks = [
        subprocess.Popen(
            [sys.executable, str(script)], stdout=subprocess.PIPE, text=True,
            env=clean_environment(**{**common, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}),
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [task.communicate(timeout=60)[0].strip() for task in tasks] == ["slurm 0 2 3", "slurm 1 2 3"]
    assert [task.returncode for task in tasks] == [0, 0]
