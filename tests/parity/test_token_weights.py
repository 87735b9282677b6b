"""Weights of tokens: in every layout, loss and gradients are those of sum(w * loss) / sum(w) over the whole step.

The truth is transformers' logits of every document by itself, in float64, and PyTorch's cross-entropy token by token;
weights are read from the records, not from what the loaders make of them.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.data.loaders import dataset_of, make_loader
from tests.data.stream_files import jsonl
from tests.models.tiny import tiny_config
from veomni.batch.counts import supervised_tokens
from veomni.batch.fields import IGNORE_INDEX
from veomni.data import train_byte_bpe
from veomni.errors import ModelError
from veomni.launcher import Launcher
from veomni.models import build_model
from veomni.strategies import DDP, FSDP1, FSDP2, ContextParallel, Single, Ulysses
from veomni.strategies.transforms.float64 import Float64Throughout
from veomni.testing import seams
from veomni.testing.oracle import BOUNDS, Truth, check, initial_model
from veomni.testing.ranks import RankFailed, run_ranks
from veomni.testing.step import Outcome, full_gradients

ROW, ROWS = 24, 8


def records(scale):
    """One row each, so that a step has them all: heavy ones are early, and some have no weights, labels or either."""
    draw, rows = torch.Generator().manual_seed(7), []
    for number in range(ROWS):
        length = (24, 17, 9, 24, 21, 13, 24, 5)[number]
        ids = torch.randint(3, 128, (length,), generator=draw).tolist()
        weights = (torch.rand(length, generator=draw) * (8.0 if number < 2 else 0.5)).tolist()
        row = {"input_ids": ids, "loss_weights": [scale * weight for weight in weights]}
        if number == 3:
            row["labels"] = [IGNORE_INDEX] * length  # nothing is learned
        if number == 4:
            row["loss_weights"] = [at % 2 for at in range(length)]
        if number == 6:
            del row["loss_weights"]
        rows.append(row)
    return rows


def targets(row):
    """Labels and weights of a document's tokens but the first."""
    weights = torch.tensor(row.get("loss_weights", [1.0] * len(row["input_ids"]))).double()  # through float32
    labels = torch.tensor(row.get("labels", row["input_ids"]))
    return labels[1:], torch.where(labels == IGNORE_INDEX, 0.0, weights)[1:]


@functools.cache
def truth(scale=1.0) -> Truth:
    model = initial_model(tiny_config("llama"), "cpu")
    total = sum(targets(row)[1].sum() for row in records(scale))
    loss = torch.zeros((), dtype=torch.float64)
    for row in records(scale):
        labels, weights = targets(row)
        with Float64Throughout():
            logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1].double()
        part = (F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none") * weights).sum() / total
        part.backward()
        loss += part.detach()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    return Truth(loss.item(), norm.item(), gradients)


@pytest.fixture(scope="module")
def tokenizer():
    import torchmetrics  # noqa: F401  (here, and not in every rank)

    truth()
    return train_byte_bpe(["any text at all"], 300)


@pytest.fixture
def loader(tmp_path, tokenizer):
    """A function that makes a loader of the records: indexed, or a stream with two packers."""

    def make(scale, streaming, micro, launcher, held_out=False):
        path = tmp_path / f"{scale}.jsonl"
        if launcher.is_rank_zero:
            jsonl(path, records(scale))
        launcher.barrier()
        dataset = dataset_of(str(path), data_type="pretokenized", streaming=streaming)
        return make_loader(
            dataset, tokenizer, global_batch_size=ROWS, micro_batch_size=micro, max_seq_len=ROW, stream_shards=2,
            cache_dir=tmp_path / "cache", pin_memory=False, epochs=1, parallel=launcher.data_parallel,
            shard=launcher.sequence_shard, strategy="best_fit" if streaming else "none", held_out=held_out,
        )  # fmt: skip

    return make


def one_step(make, strategies, micro, streaming=False, fused=True, scale=1.0, precision="fp64"):
    launcher = Launcher(strategies, accelerator="cpu", precision=precision)
    launcher.launch()
    model = launcher.setup_model(build_model(tiny_config("llama"), attention="eager"), fused_loss=fused).train()
    loader = make(scale, streaming, micro, launcher)
    seen = set()
    for batch in launcher.track(loader, max_steps=1):
        seen = {"loss_weights" in micro for micro in batch.micro_batches}
        for micro in launcher.accumulate(model, batch):
            assert not {"loss_weights", "source_ids"} & micro.inputs.keys()
            launcher.backward(model(**micro.inputs).loss, micro)
        loss, gradients = launcher.global_loss(batch).item(), full_gradients(model)
        norm = launcher.clip_grad_norm(model, 1e9).item()
    held_out = make(scale, streaming, ROWS // launcher.data_parallel.size, launcher, held_out=True)
    found = launcher.evaluate(model, held_out)
    launcher.close()
    return Outcome(loss, norm, gradients, {}), seen, found["eval_loss"]


LAYOUTS = {
    "accumulated": (1, Single, 2),
    "one by one": (1, Single, 1),
    "ddp 2": (2, DDP, 2),
    "fsdp1 2": (2, FSDP1, 4),
    "fsdp2 4": (4, FSDP2, 2),
    "ulysses 2": (2, lambda: [FSDP2(), Ulysses(2)], 2),
    "ring 2": (2, lambda: [DDP(), ContextParallel(2)], 4),
    "fsdp2 2 x ulysses 2": (4, lambda: [FSDP2(), Ulysses(2)], 1),
}


LOADED = [
    ("accumulated", "indexed"), ("one by one", "stream"), ("fsdp1 2", "indexed"), ("fsdp2 4", "stream"),
    ("ulysses 2", "indexed"), ("ring 2", "stream"), ("fsdp2 2 x ulysses 2", "stream"),
]  # fmt: skip
"""Weights that loaders bring; those of hand-made rows are in every layout of ``matrix.py``, and in every precision."""


@pytest.mark.parametrize(("layout", "source"), LOADED)
def test_loaders_bring_them(layout, source, loader):
    ranks, strategies, micro = LAYOUTS[layout]
    streaming, fused = source == "stream", source == "indexed"
    for outcome, _, evaluated in run_ranks(one_step, ranks, loader, strategies(), micro, streaming, fused, init=False):
        check(outcome, truth(), BOUNDS["fp64"])
        assert evaluated == pytest.approx(truth().loss, rel=1e-11)


def test_some_micro_batches_have_no_weights(loader):
    ((_, seen, _),) = run_ranks(one_step, 1, loader, Single(), 1, init=False)
    assert seen == {True, False}


@pytest.mark.parametrize("layout", ["accumulated", "ddp 2", "ulysses 2"])
def test_weights_may_sum_to_less_than_one(layout, loader):
    ranks, strategies, micro = LAYOUTS[layout]
    expected = truth(1e-4)
    for outcome, _, _ in run_ranks(one_step, ranks, loader, strategies(), micro, scale=1e-4, init=False):
        check(outcome, expected, BOUNDS["fp64"])


def count_tokens(weight, inputs):
    return supervised_tokens(inputs)


def weigh_unshifted(shift, values, fill):
    """The weight of a token scales the loss of the next one."""
    return values if values.is_floating_point() else shift(values, fill)


@pytest.mark.parametrize("bug", [(seams.LOSS_WEIGHT, count_tokens), (seams.LABEL_SHIFT, weigh_unshifted)])
def test_seeded_bugs_are_seen(bug, loader):
    with seams.replaced(*bug):
        ((outcome, _, _),) = run_ranks(one_step, 1, loader, Single(), 2, init=False)
    with pytest.raises(AssertionError, match="gradients off"):
        check(outcome, truth(), BOUNDS["fp64"])


def without_a_loss():
    launcher = Launcher("single", accelerator="cpu")
    launcher.launch()
    model = launcher.setup_model(nn.Linear(4, 4))
    batch = {"x": torch.ones(1, 4), "labels": torch.ones(1, 4).long(), "loss_weights": torch.full((1, 4), 0.5)}
    for step in launcher.track([[batch]]):
        next(iter(launcher.accumulate(model, step)))


def test_a_model_whose_loss_knows_no_weights_is_rejected():
    with pytest.raises(RankFailed) as raised:
        run_ranks(without_a_loss, 1, init=False)
    assert isinstance(raised.value.exceptions[0], ModelError)
    assert "Linear computes its loss itself" in str(raised.value.exceptions[0])
