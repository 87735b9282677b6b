"""The example script as people run it: layouts agree, a run resumes, what it writes is there."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.harness import RankFailed, run_ranks

ROOT = Path(__file__).parents[2]
SMALL = (
    "--model.config_overrides={num_hidden_layers: 2, hidden_size: 48, intermediate_size: 64, vocab_size: 512}",
    "--model.train_tokenizer_vocab_size=512",
    "--data.max_seq_len=64",
    "--data.eval_fraction=0.2",
    "--train.precision=fp64",
    "--train.max_steps=8",
    "--train.micro_batch_size=2",
    "--train.global_batch_size=8",
    "--train.eval.every_steps=4",
    "--train.accelerator=cpu",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for index, path in enumerate(sorted((ROOT / "veomni").glob("*.py"))):
        (folder / f"{index:02d}.txt").write_text(path.read_text())
    return folder


def script(*arguments):
    sys.argv = ["train_text.py", str(ROOT / "configs/text/tiny.yaml"), *arguments]
    runpy.run_path(str(ROOT / "examples" / "train_text.py"), run_name="__main__")


def train(corpus, output_dir, ranks, mode, *more):
    arguments = (
        *SMALL,
        f"--data.train_path={corpus}",
        f"--data.cache_dir={corpus.parent / 'cache'}",
        f"--train.output_dir={output_dir}",
        f"--train.devices={ranks}",
        f"--train.data_parallel_mode={mode}",
        *more,
    )
    run_ranks(script, ranks, *arguments, init=False)
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def single(corpus, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("single")
    return output_dir, train(corpus, output_dir, 1, "single")


def agree(found, expected, bound):
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for left, right in zip(found, expected, strict=True):
        for key in ("loss", "grad_norm"):
            assert abs(left[key] - right[key]) <= bound * right[key], (left["step"], key)


@pytest.mark.parametrize(
    ("ranks", "mode", "more"),
    [
        (2, "ddp", ()),
        (2, "fsdp1", ()),
        (2, "fsdp2", ()),
        (4, "fsdp2", ()),
        (4, "fsdp2", ("--train.data_parallel_replicate_size=2",)),
    ],
)
def test_every_layout_writes_the_same_losses_and_norms(corpus, tmp_path, single, ranks, mode, more):
    agree(train(corpus, tmp_path, ranks, mode, *more), single[1], 1e-9)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_run_resumes_from_the_middle(corpus, tmp_path, single, ranks):
    import shutil

    saving = ("--train.checkpoint.save_steps=3", "--train.checkpoint.keep_last=5")
    unbroken = train(corpus, tmp_path, 2, "fsdp2", *saving)
    for step in (6, 8):
        shutil.rmtree(tmp_path / "checkpoints" / f"global_step_{step}")
    resumed = train(corpus, tmp_path, ranks, "fsdp2", *saving)
    agree(resumed, unbroken, 0.0 if ranks == 2 else 1e-9)


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
        train(corpus, tmp_path / "out", 1, "single", "--train.global_batch_size=7")
    assert caught.value.exceptions[0].code == 78
    assert not (tmp_path / "out").exists()
