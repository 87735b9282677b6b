"""Models whose loss does not shift labels: gradients are those of the mean over all labels of the global batch.

The truth is the model as transformers builds it, in float64, on the whole batch at once. Micro-batches are unequal: one
has a single row, and rows have unequal numbers of labels.
"""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from torch import nn

from veomni.launcher import Launcher
from veomni.strategies import DDP, FSDP2, Single
from veomni.strategies.transforms.float64 import Float64Throughout
from veomni.testing.oracle import BOUNDS
from veomni.testing.ranks import RankFailed, run_ranks
from veomni.testing.step import full_gradients

NARROW = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
          "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
BERT = {**NARROW, "vocab_size": 64, "max_position_embeddings": 32, "classifier_dropout": 0.0}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
SPLITS = {"one rank": [[3, 1, 2]], "two ranks": [[3, 1], [1, 1]]}  # rows of every micro-batch, by rank


def model_of(name):
    torch.manual_seed(0)
    if name == "vit":
        config = transformers.ViTConfig(**NARROW, image_size=8, patch_size=4, num_labels=5)
        return transformers.ViTForImageClassification(config)
    if name == "t5":
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, decoder_start_token_id=0))
    kinds = {"bert": transformers.BertForSequenceClassification, "masked": transformers.BertForMaskedLM}
    return kinds[name](transformers.BertConfig(**BERT, num_labels=3))


def rows_of(name):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 64, (6, 10), generator=generator)
    if name == "vit":
        labels = torch.randint(0, 5, (6,), generator=generator)
        return {"pixel_values": torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64), "labels": labels}
    if name == "bert":
        return {"input_ids": ids, "labels": torch.randint(0, 3, (6,), generator=generator)}
    share = torch.linspace(0.9, 0.1, 6)[:, None]
    hidden = torch.rand(ids.shape, generator=generator) > share
    hidden[:, 0] = False  # the first label counts: nothing is shifted
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(hidden, -100)}


@functools.cache
def truth(name):
    model, rows = model_of(name).double().train(), rows_of(name)
    with Float64Throughout():
        loss = model(**rows).loss
    loss.backward()
    return loss.item(), {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}


def one_step(name, strategy, sizes, weight=None):
    launcher = Launcher(strategy(), accelerator="cpu", backend="gloo", precision="fp64", timeout_seconds=60)
    launcher.launch()
    model = launcher.setup_model(model_of(name)).train()
    start = sum(map(sum, sizes[: launcher.rank]))
    counts, rows = sizes[launcher.rank], {key: value[start:] for key, value in rows_of(name).items()}
    micros = zip(*(value[: sum(counts)].split(counts) for value in rows.values()), strict=True)
    for step in launcher.track([[dict(zip(rows, values, strict=True)) for values in micros]]):
        for micro in launcher.accumulate(model, step, weight=weight):
            launcher.backward(model(**micro.inputs).loss, micro)
        found = launcher.global_loss(step).item(), full_gradients(model)
    launcher.close()
    return found


@pytest.mark.parametrize(("split", "strategy"), [("one rank", Single), ("two ranks", DDP), ("two ranks", FSDP2)])
@pytest.mark.parametrize("name", ["vit", "bert", "masked", "t5"])
def test_gradients_are_those_of_the_mean_over_all_labels(name, split, strategy):
    loss, expected = truth(name)
    for found, gradients in run_ranks(one_step, len(SPLITS[split]), name, strategy, SPLITS[split], init=False):
        assert found == pytest.approx(loss, rel=BOUNDS["fp64"])
        for key, gradient in expected.items():
            bound = BOUNDS["fp64"] * gradient.norm() + 1e-18
            assert (gradients[key] - gradient).norm() <= bound, key


def test_a_weight_of_ones_own_decides():
    weigh = lambda micro: 2.0 * len(micro.inputs["labels"])  # noqa: E731
    loss, expected = truth("vit")
    ((found, gradients),) = run_ranks(one_step, 1, "vit", Single, SPLITS["one rank"], weigh, init=False)
    assert found == pytest.approx(loss, rel=1e-12)
    assert all(
        (gradients[key] - gradient).norm() <= 1e-12 * gradient.norm() + 1e-18 for key, gradient in expected.items()
    )


class Owned(nn.Module):
    """A module of one's own, called with a tensor, whose loss the loop computes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x):
        return self.linear(x)


def unlabelled(empty):
    launcher = Launcher("single", accelerator="cpu", precision="fp64")
    launcher.launch()
    model = launcher.setup_model(Owned())
    x = torch.arange(12.0, dtype=torch.float64).view(4, 3)
    batches = [[(x[:1],), (x[1:],)]]
    if empty:
        batches = [[{"x": x, "labels": torch.full((4,), -100)}]]
    for step in launcher.track(batches):
        for micro in launcher.accumulate(model, step):
            launcher.backward(model(*micro.args, **micro.inputs).square().mean(), micro)
        found = launcher.global_loss(step), full_gradients(model)
    loss = model(x).square().mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return found[0].item(), loss.item(), list(found[1].values()), list(gradients)


def test_tuples_weigh_their_rows():
    ((found, loss, own, expected),) = run_ranks(unlabelled, 1, False, init=False)
    assert found == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(own, expected, rtol=1e-12, atol=0)


def test_a_step_without_any_label_is_an_error():

    with pytest.raises(RankFailed, match="no label of step 1 counts"):
        run_ranks(unlabelled, 1, True, init=False)
