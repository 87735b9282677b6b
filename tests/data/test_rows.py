from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from tests.data.loaders import dataset_of, make_loader
from veomni.batch.counts import supervised_tokens
from veomni.batch.fields import IGNORE_INDEX

PAD, ROW = 1, 52


@pytest.fixture
def micro_batches(corpus, tokenizer, tmp_path):
    assert tokenizer.pad_token_id == PAD
    dataset = dataset_of(str(corpus))
    options = {"micro_batch_size": 4, "global_batch_size": 4, "max_seq_len": ROW, "epochs": 1, "cache_dir": tmp_path}
    return [micro for step in make_loader(dataset, tokenizer, **options) for micro in step]


def length_of_documents(micro):
    """Distances between positions 0, without tails: those start with padding."""
    starts = [*(micro["position_ids"].flatten() == 0).nonzero().flatten().tolist(), micro["labels"].numel()]
    heads = micro["input_ids"].flatten()
    return [stop - start for start, stop in pairwise(starts) if heads[start] != PAD]


def test_segments_agree_with_positions(micro_batches):
    for micro in micro_batches:
        positions = micro["position_ids"].flatten()
        starts = torch.cat([(positions == 0).nonzero().flatten(), torch.tensor([positions.numel()])])
        assert micro.rows.document_lengths == tuple(length_of_documents(micro))
        assert micro.rows.row_lengths == tuple((micro["input_ids"] != PAD).sum(-1).tolist())
        if len(starts) == len(micro["labels"]) + 1:  # each row is one document
            assert "cu_seq_lens_q" not in micro
            continue
        offsets = micro["cu_seq_lens_q"]
        assert offsets.dtype == torch.int32
        assert torch.equal(offsets.unique(), starts.to(torch.int32))
        assert torch.equal(offsets, micro["cu_seq_lens_k"])
        assert len(offsets) % 64 == 0
        assert torch.equal(positions, torch.cat([torch.arange(n) for n in starts.diff()]))
        assert starts.diff().max() <= micro["max_length_q"] == micro["max_length_k"] <= ROW
        assert set(range(0, 4 * ROW + 1, ROW)) <= set(starts.tolist()), "rows are apart"


def test_labels_are_the_ids_but_for_first_tokens_and_padding(micro_batches, tokenizer):
    for micro in micro_batches:
        ids, labels, positions = micro["input_ids"], micro["labels"], micro["position_ids"]
        assert {ids.dtype, labels.dtype, positions.dtype} == {torch.int64}
        ignored = (positions == 0) | (ids == tokenizer.pad_token_id)
        assert torch.equal(labels == IGNORE_INDEX, ignored)
        assert torch.equal(labels[~ignored], ids[~ignored])


def test_every_token_but_first_ones_is_supervised_once(micro_batches, tokenizer, corpus):
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    expected = sum(len(tokenizer(text)["input_ids"]) for text in texts)  # and an end, and less a first one
    assert sum(supervised_tokens(micro) for micro in micro_batches) == expected


def test_the_last_step_is_filled_with_rows_that_teach_nothing(micro_batches, tokenizer):
    last = micro_batches[-1]
    empty = (last["input_ids"] == tokenizer.pad_token_id).all(dim=1)
    assert all(len(micro["input_ids"]) == 4 for micro in micro_batches)
    assert empty.any(), "choose a corpus that leaves a partial step"
    assert (last["labels"][empty] == IGNORE_INDEX).all()
    assert torch.equal(last["position_ids"][empty][0], torch.arange(ROW))


@pytest.mark.parametrize("policy", ["truncate", "split", "drop"])
def test_overlong_policies(policy, tokenizer, tmp_path, caplog):
    texts = ["short one", "x1y2z3 " * 40, "short two"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    dataset = dataset_of(str(tmp_path / "t.jsonl"))
    loader = make_loader(
        dataset,
        tokenizer,
        max_seq_len=32,
        strategy="none",
        on_overflow=policy,
        shuffle=False,
        epochs=1,
        cache_dir=tmp_path,
    )
    rows = [micro["input_ids"][0].tolist() for step in loader for micro in step]
    short, long, other = ([*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts)
    pieces = {"truncate": [long[:32]], "split": [long[at : at + 32] for at in range(0, len(long), 32)], "drop": []}
    padded = [piece + [tokenizer.pad_token_id] * (32 - len(piece)) for piece in (short, *pieces[policy], other)]
    assert rows == padded
    assert "1 documents" in caplog.text, "no policy is silent"
