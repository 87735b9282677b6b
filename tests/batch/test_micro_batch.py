"""What a loader yields becomes a micro-batch, whose arguments are the model's own and nothing else."""

from __future__ import annotations

import gc
import inspect
import pickle
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

from veomni.batch.counts import label_count, row_count, supervised_tokens, token_weight
from veomni.batch.documents import RowLayout
from veomni.batch.micro_batch import MicroBatch, Origin
from veomni.batch.split import SequenceShard
from veomni.errors import DataError
from veomni.testing.documents import global_rows, pack

LENGTHS = (7, 13, 17)


def packed() -> MicroBatch:
    """A row of three documents of two sources, whose tokens are weighted."""
    batch = pack(global_rows(128)[:1])
    batch["loss_weights"] = torch.full((1, 40), 0.5)
    batch["source_ids"] = torch.tensor([[0] * 7 + [1] * 30 + [-1] * 3])
    batch["position_fractions"] = torch.ones(1, 40, 3, dtype=torch.int32)
    return MicroBatch.of_fields(batch, RowLayout(LENGTHS, (37,)), origin=Origin(("a", "b", "c"), (0, 1, 1), ("x", "y")))


@pytest.mark.parametrize("shard", [SequenceShard(), SequenceShard(2, 1)], ids=["whole", "shard"])
def test_arguments_are_what_a_forward_takes_or_documents(shard):
    documented = (
        inspect.signature(LlamaForCausalLM.forward).parameters.keys() | FlashAttentionKwargs.__annotations__.keys()
    )
    micro = packed().split(shard)
    assert micro.inputs.keys() <= documented | {"shift_labels"}
    assert {"loss_weights", "source_ids", "position_fractions"} <= micro.fields().keys()


def changed(micro: MicroBatch) -> list[MicroBatch]:
    loader = DataLoader([micro], batch_size=None, num_workers=1, collate_fn=lambda one: one)
    return [
        micro,
        micro.to("cpu"),
        pickle.loads(pickle.dumps(micro)),
        next(iter(loader)),
        micro.map(torch.Tensor, lambda value: value),
    ]


def test_a_copy_of_the_arguments_loses_nothing():
    """By copies, processes and devices: the call is still known as the micro-batch's, with its layout and targets."""
    for micro in changed(packed().split(SequenceShard(2, 1))):
        copied = {**micro.inputs}
        found = MicroBatch.of_call(copied)
        assert found is not None
        assert found.rows.document_lengths == LENGTHS
        assert (found.rows.shard, found.rows.digest) == (SequenceShard(2, 1), micro.rows.digest)
        assert torch.equal(found.targets.source_ids, micro.targets.source_ids)
        assert torch.equal(found.targets.loss_weights, micro.targets.loss_weights)
        assert found.rows.position_fractions.shape == (1, 20, 3)
        assert found.origin == Origin(("a", "b", "c"), (0, 1, 1), ("x", "y"))


def test_calls_are_told_apart_by_their_tensors():
    one, other = packed(), packed().split(SequenceShard(2, 0))
    assert MicroBatch.of_call(one.inputs).rows.shard.size == 1
    assert MicroBatch.of_call(other.inputs).rows.shard.size == 2
    assert MicroBatch.of_call({"input_ids": one.inputs["input_ids"].clone()}) is None
    arguments = dict(one.to("cpu").inputs)  # the micro-batch itself is gone
    gc.collect()
    assert MicroBatch.of_call(arguments).rows.document_lengths == LENGTHS


class Pair(NamedTuple):
    pixels: torch.Tensor
    labels: torch.Tensor


@dataclass
class Graph:
    nodes: torch.Tensor
    edges: dict[str, torch.Tensor]


class Own:
    """An object that moves itself, as graphs of other libraries do."""

    def __init__(self, device="nowhere"):
        self.device = device

    def to(self, device):
        return Own(device)


PIXELS, LABELS = torch.zeros(3, 2), torch.tensor([1, -100, 0])


@pytest.mark.parametrize(
    ("given", "inputs", "positional"),
    [
        ({"pixels": PIXELS, "labels": LABELS}, {"pixels", "labels"}, 0),
        (Pair(PIXELS, LABELS), {"pixels", "labels"}, 0),
        (Graph(PIXELS, {"to": LABELS}), {"nodes", "edges"}, 0),
        ((PIXELS, LABELS), set(), 2),
        ([PIXELS, (LABELS, LABELS)], set(), 2),
        (PIXELS, set(), 1),
        (torch.nested.nested_tensor([PIXELS, PIXELS[:1], PIXELS], layout=torch.jagged), set(), 1),
        ({"labels": LABELS, "loss_weights": torch.ones(3)}, {"labels"}, 0),
    ],
)
def test_what_a_dataloader_yields(given, inputs, positional):
    micro = MicroBatch.of(given).to("cpu")
    assert micro.inputs.keys() == inputs
    assert len(micro.args) == positional
    assert row_count(micro) == 3
    assert label_count(micro) == (2 if "labels" in inputs else 3)


def test_nested_tensors_are_moved_and_objects_move_themselves():
    micro = MicroBatch.of([Graph(PIXELS, {"to": LABELS}), {"deep": (PIXELS,)}, Own()]).to("meta")
    assert micro.args[1]["deep"][0].is_meta
    assert micro.args[2].device == "meta"
    assert MicroBatch.of(Own()).to("cpu").args[0].device == "cpu"
    with pytest.raises(DataError, match="weight=function"):
        row_count(MicroBatch.of(Own()))


@pytest.mark.parametrize("given", ["text", 3, None])
def test_what_is_no_batch_is_rejected(given):
    with pytest.raises(DataError, match=f"yielded a {type(given).__name__}"):
        MicroBatch.of(given)


def test_the_old_habits_of_a_dict_are_errors():
    with pytest.raises(TypeError, match=r"in \.inputs"):
        list(packed())
    with pytest.raises(TypeError):
        dict(**packed())


def test_counts_of_what_a_loss_averages_over():
    micro = packed()
    shifted = int((micro["labels"][:, 1:] != -100).sum())
    assert (supervised_tokens(micro), token_weight(micro)) == (shifted, shifted / 2)
    first = MicroBatch.of({"input_ids": torch.zeros(2, 3), "labels": torch.tensor([[1, 1, 1], [1, 1, -100]])})
    assert (supervised_tokens(first), label_count(first)) == (3, 5)
    one_image = MicroBatch.of({"pixel_values": torch.zeros(1, 3, 4, 4), "labels": torch.tensor([2])})
    assert (supervised_tokens(one_image), label_count(one_image)) == (1, 1)
    assert label_count(MicroBatch.of({"values": PIXELS, "labels": torch.ones(3, 5)})) == 3, "a regression's: rows"


def test_shards_are_not_split_again():
    shard = packed().split(SequenceShard(2, 0))
    assert shard.split(SequenceShard(2, 0)) is shard
    with pytest.raises(DataError, match="row shards"):
        shard.split(SequenceShard(2, 1))
    with pytest.raises(DataError, match="positional"):
        MicroBatch.of(PIXELS).split(SequenceShard(2, 1))
