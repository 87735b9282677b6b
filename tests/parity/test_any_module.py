"""Modules of one's own, fed by a torch DataLoader: every parameter's gradient is that of one process in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from veomni import Launcher
from veomni.strategies import DDP, FSDP1, FSDP2, Single
from veomni.testing.oracle import BOUNDS, Truth, check
from veomni.testing.ranks import run_ranks
from veomni.testing.step import Outcome, full_gradients

SAMPLES, BATCH = 7, 2  # two ranks with two micro-batches each: four samples and three


class ViT(nn.Module):
    """Called with positional arguments: a loader of tuples."""

    def __init__(self):
        super().__init__()
        self.patches, self.head = nn.Conv2d(1, 16, 4, 4), nn.Linear(16, 5)
        layer = partial(nn.TransformerEncoderLayer, 16, 2, 32, dropout=0.0, batch_first=True)
        self.blocks = nn.ModuleList([layer(), layer()])

    def forward(self, images):
        hidden = self.patches(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean(1))

    @staticmethod
    def data():
        return [(torch.randn(1, 8, 8, dtype=torch.float64), index % 5) for index in range(SAMPLES)]

    @staticmethod
    def loss(model, micro):
        images, labels = micro.args
        return F.cross_entropy(model(images), labels)

    collate = None


class ConvNet(ViT):
    """Its normalisation is over a micro-batch, so the truth is the mean over the same micro-batches."""

    def __init__(self):
        nn.Module.__init__(self)
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        return self.head(self.body(images).mean((2, 3)))


class GraphNet(nn.Module):
    """Called with keyword arguments: graphs of any size, as a list of dicts, whose rows cannot be counted."""

    def __init__(self):
        super().__init__()
        self.first, self.message, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, graphs):
        found = []
        for graph in graphs:
            hidden = self.first(graph["nodes"]).tanh()
            source, target = graph["edges"]
            hidden = hidden.index_add(0, target, self.message(hidden[source])).tanh()
            found.append(self.last(hidden.mean(0)))
        return torch.cat(found)

    @staticmethod
    def data():
        sizes = [5, 2, 9, 3, 3, 7, 4]
        return [{"nodes": torch.randn(size, 3, dtype=torch.float64), "edges": torch.randint(size, (2, 2 * size)),
                 "target": torch.randn((), dtype=torch.float64)} for size in sizes]  # fmt: skip

    @staticmethod
    def collate(samples):
        return {"graphs": samples, "target": torch.stack([sample["target"] for sample in samples])}

    @staticmethod
    def loss(model, micro):
        return (model(graphs=micro.inputs["graphs"]) - micro.inputs["target"]).square().mean()


def made(kind):
    """Return model and loader, the same wherever they are made."""
    torch.manual_seed(0)
    model = kind().double()
    torch.manual_seed(1)
    return model, DataLoader(kind.data(), batch_size=BATCH, collate_fn=kind.collate)


def on_a_rank(kind, strategy, accumulate):
    launcher = Launcher(strategy(), accelerator="cpu", precision="fp64", timeout_seconds=60)
    launcher.launch()
    model, loader = made(kind)
    model = launcher.setup_model(model)
    loader = launcher.setup_dataloader(loader, accumulate=accumulate)
    for step in launcher.track(loader):
        for micro in launcher.accumulate(model, step):
            launcher.backward(kind.loss(model, micro), micro)
        loss, gradients = launcher.global_loss(step).item(), full_gradients(model)
        norm = launcher.clip_grad_norm(model, 1e9).item()
    launcher.close()
    return Outcome(loss, norm, gradients, gradients)


def truth(kind, size, accumulate):
    """The mean over all samples: that of the micro-batches' losses by their samples."""
    from veomni.loop.dataloader import step_loader

    model, loader = made(kind)
    total = 0.0
    for rank in range(size):
        for step in step_loader(loader, (rank, size), seed=0, accumulate=accumulate):
            for micro in step:
                share = kind.loss(model, micro) * micro.samples / SAMPLES
                share.backward()
                total += share.item()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norm = torch.stack([grad.norm() for grad in gradients.values()]).norm().item()
    return Truth(total, norm, gradients)


@pytest.mark.parametrize("kind", [ViT, ConvNet, GraphNet])
@pytest.mark.parametrize(("strategy", "size", "accumulate"), [
    (Single, 1, 4), (DDP, 2, 2), (FSDP1, 2, 2), (FSDP2, 2, 2), (FSDP2, 4, 1),
])  # fmt: skip
def test_gradients_of_any_module(kind, strategy, size, accumulate):
    expected = truth(kind, size, accumulate)
    assert expected.gradients.keys() == dict(made(kind)[0].named_parameters()).keys()
    for outcome in run_ranks(on_a_rank, size, kind, strategy, accumulate, init=False):
        check(outcome, expected, BOUNDS["fp64"])


def test_the_truth_is_the_mean_over_samples():
    model, loader = made(GraphNet)
    batch = GraphNet.collate(loader.dataset)
    loss = (model(batch["graphs"]) - batch["target"]).square().mean().item()
    assert truth(GraphNet, 2, 2).loss == pytest.approx(loss, rel=1e-14)


class Numbers(IterableDataset):
    """As many items as its length; the ranks cannot share them evenly."""

    def __iter__(self):
        return iter(torch.arange(1.0, 12.0, dtype=torch.float64)[:, None])


def sums_of_a_stream():
    launcher = Launcher(DDP(), accelerator="cpu", precision="fp64", timeout_seconds=60)
    launcher.launch()
    model = launcher.setup_model(nn.Linear(1, 1).double())
    loader = launcher.setup_dataloader(DataLoader(Numbers(), batch_size=2), accumulate=2)
    found = []
    for step in launcher.track(loader):
        for micro in launcher.accumulate(model, step):
            (x,) = micro.args
            launcher.backward((model(x) * 0 + x).mean(), micro)
        found.append((launcher.global_loss(step).item() * step.totals["samples"], step.totals["samples"]))
    launcher.close()
    return found, loader.epoch


def test_a_stream_ends_on_all_ranks_when_every_item_was_trained_on():
    for found, epoch in run_ranks(sums_of_a_stream, 2, init=False):
        assert sum(total for total, _ in found) == pytest.approx(66, rel=1e-14)
        assert sum(samples for _, samples in found) == 11
        assert epoch == 1
