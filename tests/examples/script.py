"""Run the example script on forked ranks, and read what it measured."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

from veomni.testing.ranks import run_ranks

ROOT = Path(__file__).parents[2]
SMALL = {
    "model.config_overrides": "{num_hidden_layers: 2, hidden_size: 48, intermediate_size: 64, vocab_size: 512}",
    "model.train_tokenizer_vocab_size": 512,
    "data.max_seq_len": 64,
    "data.eval_fraction": 0.2,
    "train.precision": "fp64",
    "train.optimizer.name": "adamw",
    "train.optimizer.lr": "3e-3",
    "train.max_steps": 8,
    "train.micro_batch_size": 2,
    "train.global_batch_size": 8,
    "train.eval.every_steps": 4,
    "train.accelerator": "cpu",
}
SHORT = {
    **SMALL,
    "train.max_steps": 3,
    "train.eval.every_steps": "null",
    "train.export.hf": "false",
    "train.checkpoint.save_final": "false",
    "train.logging.plot": "false",
}
"""Three steps and nothing after them."""


def script(*arguments):
    """What each rank runs."""
    sys.argv = ["train.py", str(ROOT / "configs/text/tiny.yaml"), *arguments]
    runpy.run_path(str(ROOT / "examples" / "train.py"), run_name="__main__")


def arguments(corpus, output_dir, options):
    """The command line of a run on ``corpus`` that writes to ``output_dir``."""
    paths = {
        "data.train_path": corpus,
        "data.cache_dir": corpus.parent / "cache",
        "train.output_dir": output_dir,
    }
    return [f"--{key}={value}" for key, value in {**paths, **options}.items()]


def train(corpus, output_dir, ranks, mode, options=SMALL):
    """Train on ``ranks`` ranks and return the rows of ``metrics.jsonl``."""
    layout = {"train.devices": ranks, "train.data_parallel_mode": mode}
    run_ranks(script, ranks, *arguments(corpus, output_dir, {**layout, **options}), init=False)
    return rows(output_dir)


def rows(output_dir):
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def agree(found, expected, bound):
    """Losses and gradient norms are the same, step by step, to the relative ``bound``."""
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for left, right in zip(found, expected, strict=True):
        for key in ("loss", "grad_norm"):
            assert abs(left[key] - right[key]) <= bound * right[key], (left["step"], key)
