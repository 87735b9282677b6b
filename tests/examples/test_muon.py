"""The example script with Muon and warmup-stable-decay: every layout takes the same steps, and resumes in another."""

from __future__ import annotations

import shutil

import pytest

from tests.examples.script import SMALL, agree, train

MUON = {
    **SMALL,
    "train.max_steps": 5,
    "train.eval.every_steps": "null",
    "train.export.hf": "false",
    "train.logging.plot": "false",
    "train.optimizer.name": "muon",
    "train.scheduler.name": "wsd",
    "train.scheduler.decay_ratio": 0.4,
    "train.checkpoint.save_steps": 2,
}


@pytest.fixture(scope="module")
def single(corpus, tmp_path_factory):
    return train(corpus, tmp_path_factory.mktemp("single"), 1, "single", MUON)


@pytest.mark.parametrize(
    ("ranks", "mode", "options"),
    [(2, "ddp", {}), (4, "fsdp2", {"train.data_parallel_replicate_size": 2})],
)
def test_every_layout_takes_the_same_steps(corpus, tmp_path, single, ranks, mode, options):
    agree(train(corpus, tmp_path, ranks, mode, {**MUON, **options}), single, 1e-9)


def test_it_learns_and_decays(single):
    assert single[-1]["loss"] < single[0]["loss"]
    rates = [row["lr"] for row in single]
    assert rates[:4] == [rates[0]] * 4  # the decay starts from the peak
    assert rates[4] < rates[3]


def test_it_resumes_on_another_number_of_ranks(corpus, tmp_path, single):
    agree(train(corpus, tmp_path, 4, "fsdp2", MUON), single, 1e-9)
    shutil.rmtree(tmp_path / "checkpoints" / "global_step_5")
    agree(train(corpus, tmp_path, 1, "single", MUON), single, 1e-9)
