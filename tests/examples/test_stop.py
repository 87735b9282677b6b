"""The example script as a real process: stopped by a signal and started again, and started by train.sh."""

from __future__ import annotations

import signal
import sys

import pytest

from tests.examples.script import ROOT, SHORT, agree, arguments, rows, train
from tests.launch.conftest import Program, clean_environment, wait_until

STEPS = 60
LONG = {**SHORT, "train.max_steps": STEPS, "train.checkpoint.save_final": "true"}
TINY = str(ROOT / "configs/text/tiny.yaml")
BY_HAND = [sys.executable, str(ROOT / "examples/train.py"), TINY]
BY_TRAIN_SH = ["bash", str(ROOT / "train.sh"), str(ROOT / "examples/train.py"), TINY]
TRAIN_SH = {"PYTHON": sys.executable, "NNODES": "1", "NPROC_PER_NODE": "2"}


def options(corpus, output_dir, more):
    places = {"model.config_path": ROOT / "configs/model_configs/tiny_qwen3.json"}
    return arguments(corpus, output_dir, {**places, "train.data_parallel_mode": "fsdp2", **more})


@pytest.fixture
def start(tmp_path):
    """Start a program; what still runs at the end of the test is killed."""
    programs = []

    def begin(*command, **env):
        programs.append(Program(tmp_path, list(command), clean_environment(**env)))
        return programs[-1]

    yield begin
    for program in programs:
        if program.process.poll() is None:
            program.process.kill()
            program.process.wait()


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("unbroken")
    return train(corpus, output_dir, 2, "fsdp2", LONG)


def steps_taken(output_dir):
    metrics = output_dir / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def stop(program, output_dir, after):
    """Send SIGTERM once ``after`` steps are reported; return how many were in the end."""
    wait_until(lambda: steps_taken(output_dir) >= after or program.process.poll() is not None, 120)
    program.send(signal.SIGTERM)
    assert program.wait(120) == 75, program.output
    taken = steps_taken(output_dir)
    assert after <= taken < STEPS
    assert (output_dir / "checkpoints" / f"global_step_{taken}").is_dir()
    return taken


def test_a_run_stopped_twice_goes_on_as_if_unbroken(start, corpus, tmp_path, unbroken):
    output_dir = tmp_path / "run"
    by_hand = [*BY_HAND, *options(corpus, output_dir, {**LONG, "train.devices": 2})]
    by_train_sh = [*BY_TRAIN_SH, *options(corpus, output_dir, LONG)]

    first = stop(start(*by_train_sh, **TRAIN_SH), output_dir, 3)
    second = stop(start(*by_hand), output_dir, first + 3)
    before = rows(output_dir)
    last = start(*by_train_sh, **TRAIN_SH)
    assert last.wait(120) == 0, last.output
    found = rows(output_dir)
    assert found[:second] == before  # their times too: these steps were not taken again
    agree(found, unbroken, 0.0)


@pytest.mark.parametrize(
    ("more", "environment", "named"),
    [
        ({"train.devices": 3}, {}, "in the configuration: train.devices"),
        ({}, {"NCCL_TIMEOUT": "ten"}, "NCCL_TIMEOUT"),
    ],
)
def test_train_sh_rejects_bad_input_with_78(start, corpus, tmp_path, more, environment, named):
    program = start(*BY_TRAIN_SH, *options(corpus, tmp_path / "run", {**SHORT, **more}), **TRAIN_SH, **environment)
    assert program.wait(120) == 78, program.output
    assert program.output.count("error: ") == 1
    assert named in program.output
    assert not (tmp_path / "run").exists()
