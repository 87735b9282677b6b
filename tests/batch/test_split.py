"""Rows cut into the parts of several ranks, and put together again."""

from __future__ import annotations

import pytest
import torch

from veomni.batch.counts import supervised_tokens
from veomni.batch.documents import RowLayout, token_mask
from veomni.batch.micro_batch import MicroBatch
from veomni.batch.split import SequenceShard
from veomni.errors import DataError
from veomni.testing.documents import IGNORE, global_rows, pack

PARTS = {"ulysses2": (2, 1), "ulysses4": (4, 1), "ring2": (1, 2), "ring2 x ulysses2": (2, 2), "ulysses3": (3, 1)}


def all_parts(ulysses: int, cp: int) -> list[SequenceShard]:
    return [SequenceShard(ulysses, u, cp, c) for u in range(ulysses) for c in range(cp)]


def split_rows(batch, shard):
    return MicroBatch.of(batch).split(shard)


def together(batch: dict[str, object], name: str, parts: list[SequenceShard]) -> torch.Tensor:
    """The whole rows that the parts make up, the padded tail included."""
    cut = [split_rows(batch, part)[name] for part in parts]
    length = cut[0].shape[-1] * len(parts)
    whole = torch.full((*cut[0].shape[:-1], length), -7)
    for part, piece in zip(parts, cut, strict=True):
        whole[..., part.indices(length)] = piece
    return whole


@pytest.mark.parametrize("name", PARTS)
def test_parts_make_up_the_row_with_a_padded_tail(name):
    parts = all_parts(*PARTS[name])
    batch = pack(global_rows(128)[:3])
    for key in ("input_ids", "position_ids"):
        whole = together(batch, key, parts)
        assert torch.equal(whole[:, :40], batch[key])
    tail = together(batch, "position_ids", parts)[:, 40:]
    assert torch.equal(tail, torch.arange(tail.shape[1]).expand_as(tail))
    assert bool((together(batch, "shift_labels", parts)[:, 40:] == IGNORE).all())


@pytest.mark.parametrize("name", PARTS)
def test_labels_are_shifted_on_the_whole_row(name):
    parts = all_parts(*PARTS[name])
    batch = pack(global_rows(128)[:3])
    shifted = together(batch, "shift_labels", parts)[:, :40]
    assert torch.equal(shifted[:, :-1], batch["labels"][:, 1:])
    assert bool((shifted[:, -1] == IGNORE).all())
    assert sum(supervised_tokens(split_rows(batch, part)) for part in parts) == supervised_tokens(MicroBatch.of(batch))


def test_document_borders_are_those_of_whole_rows_and_a_tail_is_one_more():
    rows = global_rows(128)[:2]
    batch = pack(rows)
    assert torch.equal(split_rows(batch, SequenceShard(2, 0))["cu_seq_lens_q"], batch["cu_seq_lens_q"])
    lengths = [len(document.tokens) for documents in rows for document in documents]
    found = split_rows(batch, SequenceShard(3, 1))["cu_seq_lens_k"].tolist()
    first = [7, 20, 37, 40, 42]  # what is left of row 0 is a segment already, the padded tail the next one
    assert found == [0, *first, *(42 + end for end in (5, 36, 40, 42))]
    assert lengths == [7, 13, 17, 5, 31]


def test_borders_are_found_in_position_ids_where_the_loader_gave_none():
    batch = {key: value for key, value in pack(global_rows(128)[:2]).items() if not key.startswith(("cu_", "max_"))}
    part = split_rows(batch, SequenceShard(2, 1))
    assert part["cu_seq_lens_q"].tolist() == [0, 7, 20, 37, 40, 45, 76, 80]
    assert part["max_length_q"] == 31


def test_a_row_that_is_one_document_needs_no_borders():
    ids = torch.arange(16)[None]
    part = split_rows({"input_ids": ids, "labels": ids}, SequenceShard(4, 2))
    assert "cu_seq_lens_q" not in part
    assert part["position_ids"].tolist() == [[8, 9, 10, 11]]
    assert part["shift_labels"].tolist() == [[9, 10, 11, 12]]
    assert part.rows.shard.size == 4


def test_positions_with_axes_are_cut_along_the_row():
    ids, axes = torch.arange(8)[None], torch.arange(24).view(3, 1, 8)
    part = split_rows(
        {"input_ids": ids, "position_ids": axes, "cu_seq_lens_q": torch.tensor([0, 8])}, SequenceShard(2, 1)
    )
    assert torch.equal(part["position_ids"], axes[..., 4:])


def test_embedded_rows_are_cut_and_padded():
    embedded = torch.randn(2, 5, 3)
    part = split_rows({"inputs_embeds": embedded}, SequenceShard(2, 1))
    assert torch.equal(part["inputs_embeds"][:, :2], embedded[:, 3:])
    assert not part["inputs_embeds"][:, 2:].any()


def test_what_throughput_is_counted_from_stays():
    batch = MicroBatch(pack(global_rows(128)[:1]), RowLayout((7, 13, 17)))
    assert batch.split(SequenceShard(2, 1)).rows.document_lengths == (7, 13, 17)


def test_the_digest_tells_rows_apart_and_is_the_same_for_all_parts():
    one, other = pack(global_rows(128)[:1]), pack(global_rows(128)[1:2])
    digests = {split_rows(one, part).rows.digest for part in all_parts(4, 1)}
    assert len(digests) == 1
    assert split_rows(other, SequenceShard(4, 0)).rows.digest not in digests


@pytest.mark.parametrize(
    ("inputs", "part", "named"),
    [
        ({"input_ids": torch.zeros(1, 8), "attention_mask": torch.ones(1, 8)}, (2, 0), "attention_mask"),
        ({"input_ids": torch.zeros(1, 3)}, (4, 0), "3 tokens is too short for 4 ranks"),
        ({"input_ids": torch.zeros(1, 6)}, (1, 0, 4, 0), "too short for 4 ranks"),
        ({"input_ids": torch.zeros(1, 8), "weights": torch.ones(1, 8)}, (2, 0), "weights"),
        ({"pixel_values": torch.zeros(1, 8)}, (2, 0), "neither input_ids nor inputs_embeds"),
    ],
)
def test_what_cannot_be_cut_is_rejected(inputs, part, named):
    with pytest.raises(DataError, match=named) as caught:
        split_rows(inputs, SequenceShard(*part))
    assert caught.value.fix


def mask_of(micro):
    return token_mask(micro.inputs, micro.rows)


def zeros(length, *layout):
    return MicroBatch({"input_ids": torch.zeros(2, length, dtype=torch.int64)}, RowLayout(*layout))


def test_which_positions_hold_a_token():
    batch = zeros(9, (4, 3, 9), (7, 9))
    whole = torch.arange(9) < torch.tensor([[7], [9]])
    assert torch.equal(mask_of(batch), whole)
    for shard in (SequenceShard(2, rank) for rank in range(2)):  # the split pads rows to 10
        padded = torch.nn.functional.pad(whole, (0, 1))
        assert torch.equal(mask_of(batch.split(shard)), padded[:, shard.indices(10)])
    ring = SequenceShard(1, 0, 2, 1)
    padded = torch.nn.functional.pad(whole, (0, 3))
    assert torch.equal(mask_of(batch.split(ring)), padded[:, ring.indices(12)])


def test_rows_without_padding_need_no_mask():
    assert mask_of(zeros(8, (3, 5, 8))) is None
    assert mask_of(MicroBatch.of({"input_ids": torch.zeros(2, 8, dtype=torch.int64)})) is None
    assert mask_of(MicroBatch.of({"pixels": torch.zeros(2, 8)})) is None


def test_a_padding_mask_locates_padding():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    batch = MicroBatch.of({"input_ids": torch.zeros(2, 3, dtype=torch.int64), "attention_mask": mask})
    assert torch.equal(mask_of(batch), mask.bool())
    assert batch.rows.document_lengths == (2, 3)


def test_padding_that_is_not_located_is_rejected():
    with pytest.raises(DataError, match="8 of its 16 tokens"):
        mask_of(zeros(8, (3, 5)))
