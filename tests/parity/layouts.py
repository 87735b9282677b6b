"""Run one step of the launcher's loop on a layout and bring back every parameter's whole gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from tests.models.tiny import tiny_config
from tests.parity.documents import global_rows, share
from tests.parity.oracle import Truth, vocabulary
from veomni.launcher import Launcher
from veomni.models import build_model
from veomni.strategies import DDP, FSDP1, FSDP2, ContextParallel, Single, Ulysses

LAYOUTS: dict[str, tuple[int, Callable[[], Any]]] = {
    "single": (1, Single),
    "ddp2": (2, DDP),
    "fsdp1_full": (2, FSDP1),
    "fsdp1_grad_op": (2, lambda: FSDP1(sharding="grad_op")),
    "fsdp1_hybrid": (4, lambda: FSDP1(replicate=2)),
    "fsdp2_1": (1, FSDP2),
    "fsdp2_2": (2, FSDP2),
    "fsdp2_4": (4, FSDP2),
    "hsdp_2x2": (4, lambda: FSDP2(replicate=2)),
    "fsdp2_keep_gathered": (2, lambda: FSDP2(reshard_after_forward=False, reshard_after_backward=False, prefetch=1)),
    "ulysses2_ddp": (2, lambda: [DDP(), Ulysses(2)]),
    "ulysses2_fsdp1": (2, lambda: [FSDP1(), Ulysses(2)]),
    "ulysses2_fsdp2": (2, lambda: [FSDP2(), Ulysses(2)]),
    "ulysses2_fsdp2_2": (4, lambda: [FSDP2(), Ulysses(2)]),
    "ulysses2_ddp_2": (4, lambda: [DDP(), Ulysses(2)]),
    "ulysses4_fsdp1": (4, lambda: [FSDP1(), Ulysses(4)]),
    "ulysses4_fsdp2": (4, lambda: [FSDP2(), Ulysses(4)]),
    "ring2_ddp": (2, lambda: [DDP(), ContextParallel(2)]),
    "ring2_fsdp1": (2, lambda: [FSDP1(), ContextParallel(2)]),
    "ring4_fsdp2": (4, lambda: [FSDP2(), ContextParallel(4)]),
    "ring2_ulysses2_fsdp2": (4, lambda: [FSDP2(), Ulysses(2), ContextParallel(2)]),
    "ring2_async2_ddp": (4, lambda: [DDP(), Ulysses(2, async_=True), ContextParallel(2)]),
    "async2_ddp": (2, lambda: [DDP(), Ulysses(2, async_=True)]),
    "async2_fsdp1": (2, lambda: [FSDP1(), Ulysses(2, async_=True)]),
    "async4_fsdp2": (4, lambda: [FSDP2(), Ulysses(4, async_=True)]),
    "ulysses2_hsdp": (4, lambda: [FSDP2(replicate=2), Ulysses(2)]),
    "ulysses2_fsdp1_hybrid": (4, lambda: [FSDP1(replicate=2), Ulysses(2)]),
    "fsdp2_offload": (2, lambda: FSDP2(cpu_offload=True)),
}

EXPERT_LAYOUTS: dict[str, tuple[int, Callable[[], Any]]] = {
    "ep2_fsdp2": (2, lambda: FSDP2(expert_parallel_size=2)),
    "ep2_chunks": (2, lambda: FSDP2(expert_parallel_size=2, expert_chunks=2)),
    "ep2_fixed": (2, lambda: FSDP2(expert_parallel_size=2, expert_exchange="fixed")),
    "ep2_fsdp2_4": (4, lambda: FSDP2(expert_parallel_size=2)),
    "ep2_outside": (4, lambda: FSDP2(expert_parallel_size=2, expert_parallel_outside=True)),
    "ep4_chunks": (4, lambda: FSDP2(expert_parallel_size=4, expert_chunks=2)),
    "ep4_fixed": (4, lambda: FSDP2(expert_parallel_size=4, expert_chunks=3, expert_exchange="fixed")),
    "ep2_hsdp": (4, lambda: FSDP2(expert_parallel_size=2, replicate=2)),
    "ep2_ulysses2": (4, lambda: [FSDP2(expert_parallel_size=2), Ulysses(2)]),
    "ep4_ulysses2": (4, lambda: [FSDP2(expert_parallel_size=4), Ulysses(2)]),
    "ep4_ring2_ulysses2": (4, lambda: [FSDP2(expert_parallel_size=4), ContextParallel(2), Ulysses(2)]),
    "ep2_fsdp1": (2, lambda: FSDP1(expert_parallel_size=2)),
    "ep2_fsdp1_4": (4, lambda: FSDP1(expert_parallel_size=2, expert_chunks=2)),
    "ep2_fsdp1_hybrid": (4, lambda: FSDP1(expert_parallel_size=2, replicate=2)),
    "ep4_fsdp1_ulysses2": (4, lambda: [FSDP1(expert_parallel_size=4), Ulysses(2)]),
    "ep2_offload": (4, lambda: FSDP2(expert_parallel_size=2, cpu_offload=True)),
    "ep2_keep_gathered": (
        4, lambda: FSDP2(expert_parallel_size=2, reshard_after_forward=False, reshard_after_backward=False, prefetch=2)
    ),
}  # fmt: skip
BOUNDS = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 5e-2}
"""Relative, per tensor: ARCHITECTURE section 4."""


@dataclass
class Outcome:
    loss: float
    grad_norm: float
    gradients: dict[str, torch.Tensor]
    clipped: dict[str, torch.Tensor]


def one_step(
    model_name: str,
    layout: str,
    *,
    precision: str = "fp64",
    accumulation: int = 1,
    recompute: str = "none",
    max_norm: float = 1e9,
    accelerator: str = "cpu",
    backend: str = "gloo",
    weights: str = "random",
    attention: str = "auto",
    changes: dict[str, Any] | None = None,
) -> Outcome:
    """What every rank runs; ``changes`` are the configuration's."""
    launcher = Launcher(
        (LAYOUTS | EXPERT_LAYOUTS)[layout][1](),
        accelerator=accelerator,
        backend=backend,
        precision=precision,
        recompute=recompute,
        timeout_seconds=60,
    )
    launcher.launch()
    model = launcher.setup_model(
        build_model(tiny_config(model_name, **changes or {}), weights=weights, attention=attention)
    )
    model.train()
    place = launcher.data_parallel
    loader = [share(global_rows(vocabulary(model_name)), place.rank, place.size, accumulation)]
    for batch in launcher.track(loader):
        for micro in launcher.accumulate(model, batch):
            launcher.backward(model(**micro.inputs).loss, micro)
        loss = launcher.global_loss(batch).item()
        gradients = full_gradients(model)
        norm = launcher.clip_grad_norm(model, max_norm).item()
    clipped = full_gradients(model)
    launcher.close()
    return Outcome(loss, norm, gradients, clipped)


def full_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return _named_gradients(model)
    return _named_gradients(model)


def _named_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        clean = name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")
        found[clean] = grad.detach().cpu().clone()
    return found


def check(outcome: Outcome, truth: Truth, bound: float) -> None:
    """Loss, norm and every parameter's gradient, relative and per tensor."""
    assert outcome.gradients.keys() == truth.gradients.keys()
    worst = {name: _relative(outcome.gradients[name], truth.gradients[name]) for name in truth.gradients}
    wrong = {name: error for name, error in worst.items() if not error <= bound}
    assert not wrong, f"gradients off by more than {bound}: {wrong}"
    assert abs(outcome.loss - truth.loss) <= bound * abs(truth.loss)
    assert abs(outcome.grad_norm - truth.grad_norm) <= bound * truth.grad_norm


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    scale = expected.double().norm()
    difference = (found.double() - expected.double()).norm()
    return float(difference / scale) if scale else float(difference)
