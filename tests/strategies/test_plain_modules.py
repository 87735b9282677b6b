"""A module of one's own: buffers as torch's DDP has them on every rank, and float32 outputs where compute is bf16."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from veomni.launcher import Launcher
from veomni.models import unwrap
from veomni.strategies import DDP, FSDP1, FSDP2, Single
from veomni.testing.ranks import run_ranks

STEPS = 3
STRATEGIES = {"ddp": DDP, "fsdp1": FSDP1, "fsdp2": FSDP2}


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))


def images(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(5, 1, 6, 6, generator=generator) + rank, torch.randint(0, 3, (5,), generator=generator)


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in unwrap(model).named_buffers()}


def torch_ddp() -> dict[str, Tensor]:
    model = DistributedDataParallel(convolutional())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        pixels, labels = images(dist.get_rank(), step)
        cross_entropy(model(pixels), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return buffers_of(model)


def ours(strategy: str) -> tuple[dict[str, Tensor], Tensor]:
    """Buffers after training, and what an evaluation then gives for the same image on every rank."""
    launcher = Launcher(STRATEGIES[strategy](), accelerator="cpu", backend="gloo", timeout_seconds=60)
    launcher.launch()
    model = launcher.setup_model(convolutional()).train()
    optimizer = launcher.setup_optimizer(model, torch.optim.SGD, lr=0.1)
    for step in launcher.track([[images(launcher.rank, index)] for index in range(STEPS)]):
        for micro in launcher.accumulate(model, step):
            pixels, labels = micro.args
            launcher.backward(cross_entropy(model(pixels), labels), micro)
        optimizer.step()
        optimizer.zero_grad()
    found = buffers_of(model)
    with torch.no_grad():
        scores = model.eval()(images(0, 0)[0])
    launcher.close()
    return found, scores


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_running_statistics_are_those_of_torch_ddp_on_every_rank(strategy):
    truth = run_ranks(torch_ddp, 2)[0]
    (first, first_scores), (second, second_scores) = run_ranks(ours, 2, strategy, init=False)
    assert first.keys() == truth.keys()
    for name, expected in truth.items():
        torch.testing.assert_close(first[name], expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(first[name], second[name]), name
    assert torch.equal(first_scores, second_scores)


@dataclass
class Output:
    scores: Tensor
    names: tuple[str, ...] = ("a",)


class Mixed(nn.Module):
    """Returns what people return: a tensor in a mapping, a list, a tuple and a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, values: Tensor) -> dict[str, object]:
        scores = self.head(values)
        return {"plain": scores, "many": [scores, (scores, 1)], "output": Output(scores), "index": scores.argmax(-1)}


def output_types(strategy: type) -> tuple[list[torch.dtype], torch.dtype]:
    launcher = Launcher(strategy(), accelerator="cpu", backend="gloo", precision="bf16", timeout_seconds=60)
    launcher.launch()
    model = launcher.setup_model(Mixed())
    inside: list[torch.dtype] = []
    unwrap(model).head.register_forward_hook(lambda module, args, output: inside.append(output.dtype))
    found = model(torch.ones(3, 4))
    assert found["index"].dtype is torch.int64
    many = found["many"]
    launcher.close()
    return [found["plain"].dtype, many[0].dtype, many[1][0].dtype, found["output"].scores.dtype], inside[0]


@pytest.mark.parametrize(("strategy", "ranks"), [(Single, 1), (DDP, 2), (FSDP1, 2), (FSDP2, 2)])
def test_floating_outputs_are_float32_where_compute_is_bf16(strategy, ranks):
    for outputs, inside in run_ranks(output_types, ranks, strategy, init=False):
        assert inside is torch.bfloat16
        assert outputs == [torch.float32] * 4
