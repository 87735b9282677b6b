"""The example script as people run it: layouts agree, a run resumes, what it writes is there."""

from __future__ import annotations

import shutil

import pytest

from tests.examples.script import SMALL, agree, train

LEAN = {**SMALL, "train.export.hf": "false", "train.logging.plot": "false"}
FOUR_STEPS = {**LEAN, "train.max_steps": 4, "train.checkpoint.save_final": "false"}
SAVING = {**LEAN, "train.checkpoint.save_steps": 3, "train.checkpoint.keep_last": 5}


@pytest.fixture(scope="module")
def single(corpus, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("single")
    return output_dir, train(corpus, output_dir, 1, "single")


@pytest.fixture(scope="module")
def four_steps(corpus, tmp_path_factory):
    return train(corpus, tmp_path_factory.mktemp("four"), 1, "single", FOUR_STEPS)


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory):
    """A run of two ranks that share rows, saved after every third step."""
    output_dir = tmp_path_factory.mktemp("unbroken")
    return output_dir, train(corpus, output_dir, 2, "fsdp2", {**SAVING, "train.ulysses_parallel_size": 2})


@pytest.mark.parametrize(
    ("ranks", "mode", "options"),
    [
        (4, "fsdp2", {"train.data_parallel_replicate_size": 2}),
        (2, "ddp", {"train.ulysses_parallel_size": 2}),
        (4, "fsdp1", {"train.ulysses_parallel_size": 2, "train.ulysses.overlap": True}),
        (4, "fsdp2", {"train.ulysses_parallel_size": 2, "train.context_parallel_size": 2}),
        (4, "fsdp2", {"train.ulysses_parallel_size": 4, "data.num_workers": 1, "train.validate_batches": True}),
    ],
)
def test_every_layout_writes_the_same_losses_and_norms(corpus, tmp_path, four_steps, ranks, mode, options):
    """Data parallelism without more, on two ranks: test_runs."""
    agree(train(corpus, tmp_path, ranks, mode, {**FOUR_STEPS, **options}), four_steps, 1e-9)


@pytest.mark.parametrize(("ranks", "sharing", "bound"), [(2, 2, 0.0), (4, 1, 1e-9), (4, 4, 1e-9)])
def test_a_run_resumes_from_the_middle(corpus, tmp_path, single, unbroken, ranks, sharing, bound):
    agree(unbroken[1], single[1], 1e-9)
    shutil.copytree(unbroken[0], tmp_path / "run")
    for step in (6, 8):
        shutil.rmtree(tmp_path / f"run/checkpoints/global_step_{step}")
    resumed = train(corpus, tmp_path / "run", ranks, "fsdp2", {**SAVING, "train.ulysses_parallel_size": sharing})
    agree(resumed, unbroken[1], bound)


def test_what_a_run_leaves_behind(single):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output_dir, rows = single
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["perplexity"] < rows[3]["perplexity"]
    assert (output_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (output_dir / "veomni_cli.yaml").is_file()
    assert AutoModelForCausalLM.from_pretrained(output_dir / "hf").config.hidden_size == 48
    assert len(AutoTokenizer.from_pretrained(output_dir / "hf")) == 512
