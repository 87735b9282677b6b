"""The long-context configuration as people run it, with shorter rows: four ranks that share each."""

from __future__ import annotations

import runpy
import sys

import pytest

from tests.examples.script import ROOT, SHORT, agree, arguments, rows
from veomni.testing.ranks import run_ranks

CONFIG = ROOT / "configs/text/long_context.yaml"
SIZES = {
    **SHORT,
    "model.config_overrides": "{vocab_size: 512}",
    "train.micro_batch_size": 1,
    "train.global_batch_size": 2,
    "data.max_seq_len": 250,
}


def script(*options):
    sys.argv = ["train.py", str(CONFIG), *options]
    runpy.run_path(str(ROOT / "examples/train.py"), run_name="__main__")


def run(corpus, output_dir, ranks, layout):
    run_ranks(script, ranks, *arguments(corpus, output_dir, {**SIZES, "train.devices": ranks, **layout}), init=False)
    return rows(output_dir)


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    layout = {"train.data_parallel_mode": "single", "train.ulysses_parallel_size": 1}
    return run(corpus, tmp_path_factory.mktemp("alone"), 1, layout)


@pytest.mark.parametrize("split", [{}, {"train.ulysses.overlap": True}, {"train.context_parallel_size": 2}])
def test_four_ranks_train_as_one_does(corpus, tmp_path, alone, split):
    shared = {"train.ulysses_parallel_size": 2 if "train.context_parallel_size" in split else 4, **split}
    agree(run(corpus, tmp_path / "shared", 4, shared), alone, 1e-9)
