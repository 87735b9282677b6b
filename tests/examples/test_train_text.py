"""The example script as people run it: layouts agree, a run resumes, what it writes is there."""

from __future__ import annotations

import shutil

import pytest

from tests.examples.script import SMALL, agree, train
from veomni.testing.ranks import RankFailed


@pytest.fixture(scope="module")
def single(corpus, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("single")
    return output_dir, train(corpus, output_dir, 1, "single")


@pytest.mark.parametrize(
    ("ranks", "mode", "options"),
    [
        (2, "ddp", {}),
        (2, "fsdp1", {}),
        (2, "fsdp2", {}),
        (4, "fsdp2", {}),
        (4, "fsdp2", {"train.data_parallel_replicate_size": 2}),
        (2, "ddp", {"train.ulysses_parallel_size": 2}),
        (4, "fsdp1", {"train.ulysses_parallel_size": 2, "train.ulysses.overlap": True}),
        (4, "fsdp2", {"train.ulysses_parallel_size": 2, "train.context_parallel_size": 2}),
        (4, "fsdp2", {"train.ulysses_parallel_size": 4, "data.num_workers": 1, "train.validate_batches": True}),
    ],
)
def test_every_layout_writes_the_same_losses_and_norms(corpus, tmp_path, single, ranks, mode, options):
    agree(train(corpus, tmp_path, ranks, mode, {**SMALL, **options}), single[1], 1e-9)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_run_resumes_from_the_middle(corpus, tmp_path, single, ranks):
    saving = {**SMALL, "train.checkpoint.save_steps": 3, "train.checkpoint.keep_last": 5}
    unbroken = train(corpus, tmp_path, 2, "fsdp2", saving)
    for step in (6, 8):
        shutil.rmtree(tmp_path / "checkpoints" / f"global_step_{step}")
    resumed = train(corpus, tmp_path, ranks, "fsdp2", saving)
    agree(resumed, unbroken, 0.0 if ranks == 2 else 1e-9)


def test_a_run_resumes_with_another_number_of_ranks_per_row(corpus, tmp_path, single):
    saving = {**SMALL, "train.checkpoint.save_steps": 3, "train.checkpoint.keep_last": 5}
    train(corpus, tmp_path, 4, "fsdp2", {**saving, "train.ulysses_parallel_size": 4})
    for step in (6, 8):
        shutil.rmtree(tmp_path / "checkpoints" / f"global_step_{step}")
    resumed = train(corpus, tmp_path, 4, "fsdp2", {**saving, "train.ulysses_parallel_size": 2})
    agree(resumed, single[1], 1e-9)


def test_what_a_run_leaves_behind(single):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output_dir, rows = single
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["perplexity"] < rows[3]["perplexity"]
    assert (output_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (output_dir / "veomni_cli.yaml").is_file()
    assert AutoModelForCausalLM.from_pretrained(output_dir / "hf").config.hidden_size == 48
    assert len(AutoTokenizer.from_pretrained(output_dir / "hf")) == 512


def test_bad_input_ends_with_78_and_writes_nothing(tmp_path, corpus):
    with pytest.raises(RankFailed) as caught:
        train(corpus, tmp_path / "out", 1, "single", {**SMALL, "train.global_batch_size": 7})
    assert caught.value.exceptions[0].code == 78
    assert not (tmp_path / "out").exists()
