"""A mixture read as a stream, through the example script: layouts agree, and a run goes on on other ranks."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.data.stream_files import jsonl, records
from tests.examples.script import SHORT, SMALL, agree, train

STREAM = {
    **SMALL,
    "data.eval_fraction": 0,
    "train.eval.every_steps": "null",
    "train.export.hf": "false",
    "train.logging.plot": "false",
    "data.streaming": "true",
    "data.stream_shards": 8,
    "data.lookahead": 8,
    "data.sampling": "token",
    "data.on_overflow": "split",
    "data.train_path": "null",
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    entries = []
    for name, count, weight in (("stories", 200, 2), ("notes", 90, 1)):
        path = jsonl(folder / f"{name}.jsonl", records(count, f"{name} "))
        entries.append({"path": str(path), "name": name, "weight": weight})
    return folder / "data", {**STREAM, "data.sources": json.dumps(entries)}


def same(found, expected, bound):
    agree(found, expected, bound)
    for left, right in zip(found, expected, strict=True):
        for key in right:
            if key.startswith("source_"):
                assert left[key] == pytest.approx(right[key], rel=max(bound, 1e-12)), (left["step"], key)


@pytest.fixture(scope="module")
def single(sources, tmp_path_factory):
    corpus, options = sources
    return train(corpus, tmp_path_factory.mktemp("single"), 1, "single", options)


def test_metrics_have_every_source(single):
    for row in single:
        assert row["source_samples/stories"] > 0
        learned = row["source_loss/stories"] is not None
        assert learned
    tokens = [sum(row[f"source_tokens/{name}"] for row in single) for name in ("stories", "notes")]
    assert tokens[0] / sum(tokens) == pytest.approx(2 / 3, abs=0.05)


@pytest.mark.parametrize(
    ("ranks", "mode", "options"),
    [
        (2, "ddp", {}),
        (4, "fsdp2", {"data.num_workers": 1}),
        (4, "fsdp2", {"train.ulysses_parallel_size": 2, "data.num_workers": 2}),
    ],
)
def test_every_layout_writes_the_same_numbers(sources, tmp_path, single, ranks, mode, options):
    corpus, shared = sources
    same(train(corpus, tmp_path, ranks, mode, {**shared, **options}), single, 1e-9)


def test_a_run_goes_on_on_other_ranks(sources, tmp_path, single):
    corpus, options = sources
    saving = {**options, "train.checkpoint.save_steps": 3, "train.checkpoint.keep_last": 5}
    train(corpus, tmp_path, 4, "fsdp2", saving)
    for ranks, lost in ((2, (6, 8)), (1, (8,)), (4, (6, 8))):
        for step in lost:
            shutil.rmtree(tmp_path / "checkpoints" / f"global_step_{step}")
        same(train(corpus, tmp_path, ranks, "fsdp2", saving), single, 1e-9)


def test_a_mixture_that_ends_is_saved(sources, tmp_path):
    corpus, options = sources
    ending = {
        "data.stopping_strategy": "first_exhausted",
        "train.max_steps": 100,
        "train.checkpoint.save_steps": "null",
    }
    rows = train(corpus, tmp_path, 2, "fsdp2", {**options, **ending})
    assert 5 < len(rows) < 100
    assert (tmp_path / "checkpoints" / f"global_step_{len(rows)}").is_dir()


def test_balanced_ranks_take_the_same_steps(corpus, tmp_path):
    options = {**SHORT, "data.on_overflow": "split"}
    plain = train(corpus, tmp_path / "plain", 1, "single", options)
    found = train(corpus, tmp_path / "balanced", 2, "fsdp2", {**options, "data.balance": "true"})
    agree(found, plain, 1e-9)
