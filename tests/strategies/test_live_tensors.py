"""A step leaves nothing behind: with Python's collector off, no strategy keeps more tensors alive from step to step.

Every layout trains ten steps. After each, the tensors, contexts of autograd functions and exchanges made since setup
are counted. Threads of a backend release a tensor a little later at times, so growth is what no later count is free of.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.distributed.fsdp import FullyShardedDataParallel

from tests.models.multimodal import Sampler, family_config
from tests.models.tiny import tiny_config
from tests.parity.layouts import EXPERT_LAYOUTS, LAYOUTS, beside, vocabulary
from tests.strategies.media import ROW
from veomni.data.multimodal.collate import MultimodalCollator
from veomni.launcher import Launcher
from veomni.models import build_model
from veomni.ops.comm.all_to_all import AsyncAllToAll
from veomni.optim import build_optimizer
from veomni.strategies import DDP, FSDP2, Single, Ulysses
from veomni.testing.documents import global_rows, share
from veomni.testing.ranks import run_ranks

STEPS = 10
COUNTED = (Tensor, BackwardCFunction, AsyncAllToAll)

TEXT = {
    1: ["single", "fsdp2_inputs_offloaded"],
    2: ["ddp2", "fsdp1_full", "fsdp2_2", "ulysses2_fsdp2", "async2_ddp", "async2_fsdp1", "ring2_ddp"],
    4: ["hsdp_2x2", "async4_fsdp2", "ring2_async2_ddp", "ring2_ulysses2_fsdp2"],
}
EXPERTS = {
    2: ["ep2_fsdp2", "ep2_chunks", "ep2_fixed", "ep2_fsdp1"],
    4: ["ep2_hsdp", "ep4_ulysses2"],
}


def alive() -> Counter[str]:
    found: Counter[str] = Counter()
    for item in gc.get_objects():
        for kind in COUNTED:
            if issubclass(type(item), kind):
                found[kind.__name__] += 1
    return found


@contextmanager
def collector_off() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # what exists by now is not listed again
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def text_rows(launcher: Launcher) -> list[dict[str, Any]]:
    return share(global_rows(vocabulary("qwen3")), launcher.data_parallel.rank, launcher.data_parallel.size, 2)


def images(launcher: Launcher) -> list[dict[str, Any]]:
    """Rank 0 has all images, and other ranks encode some of them."""
    heavy = [("image", (1, 8, 8)), ("text", 3), ("image", (1, 8, 8)), ("text", 2)]
    document = Sampler("qwen3_vl")(heavy if launcher.data_parallel.rank == 0 else [("text", 9)])
    collate = MultimodalCollator(family_config("qwen3_vl"), max_seq_len=ROW, shard=launcher.sequence_shard)
    return [collate([[document]])] * 2


def counts(
    strategy: Any, config: Any, rows: Callable[[Launcher], list[dict[str, Any]]], spoil: Callable[[nn.Module], None]
) -> list[Counter[str]]:
    """What is alive after each step."""
    strategies = beside(strategy, balance=rows is images)
    launcher = Launcher(strategies, accelerator="cpu", backend="gloo", timeout_seconds=60)
    launcher.launch()
    model = launcher.setup_model(build_model(config, weights="random")).train()
    spoil(model)
    flat = isinstance(model, FullyShardedDataParallel)  # Muon needs whole matrices
    options = {"name": "sgd"} if flat else {"name": "muon", "betas": (0.9, 0.99)}
    optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.0, momentum=0.9, **options)
    found = []
    with collector_off():
        for batch in launcher.track([rows(launcher)] * STEPS, gc_steps=None):
            for micro in launcher.accumulate(model, batch):
                launcher.backward(model(**micro.inputs).loss, micro)
            launcher.clip_grad_norm(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            del micro
            found.append(alive())
    launcher.close()
    return found


def nothing(model: nn.Module) -> None:
    return


class Circle(torch.autograd.Function):
    """The mistake that this file is about: a context that holds what holds the output."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.holder = [value * 1.0]
        return ctx.holder[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def plant_a_circle(model: nn.Module) -> None:
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: Circle.apply(output))


def every_layout(names: list[str], model: str) -> dict[str, list[Counter[str]]]:
    layouts = LAYOUTS | EXPERT_LAYOUTS
    return {name: counts(layouts[name][1](), tiny_config(model), text_rows, nothing) for name in names}


def growing(found: list[Counter[str]]) -> bool:
    """Whether each of the last five counts is above each of those after steps 2 to 5."""
    kinds = {kind for count in found for kind in count}
    return any(min(count[kind] for count in found[5:]) > max(count[kind] for count in found[1:5]) for kind in kinds)


def check(results: list[dict[str, list[Counter[str]]]]) -> None:
    leaks = {name: found for by_layout in results for name, found in by_layout.items() if growing(found)}
    assert not leaks, leaks


@pytest.mark.parametrize("ranks", TEXT)
def test_text_models(ranks):
    check(run_ranks(every_layout, ranks, TEXT[ranks], "qwen3", init=False))


@pytest.mark.parametrize("ranks", EXPERTS)
def test_experts(ranks):
    check(run_ranks(every_layout, ranks, EXPERTS[ranks], "qwen3_moe", init=False))


def balanced(strategy: Callable[[], Any]) -> dict[str, list[Counter[str]]]:
    return {"balance": counts(strategy(), family_config("qwen3_vl"), images, nothing)}


@pytest.mark.parametrize(
    ("ranks", "strategy"), [(2, FSDP2), (2, lambda: [DDP(), Ulysses(2)])], ids=["fsdp2", "ulysses"]
)
def test_balanced_encoders(ranks, strategy):
    check(run_ranks(balanced, ranks, strategy, init=False))


def test_a_planted_leak_is_found():
    (found,) = run_ranks(counts, 1, Single(), tiny_config("qwen3"), text_rows, plant_a_circle, init=False)
    assert growing(found)
