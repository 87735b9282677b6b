"""The layouts that steps of tiny models are compared on, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.models.tiny import tiny_config
from veomni.strategies import (
    DDP,
    FSDP1,
    FSDP2,
    ActivationCheckpointing,
    Compile,
    ContextParallel,
    EncoderBalance,
    ExpertParallel,
    Single,
    Strategy,
    TiledMLP,
    Ulysses,
)  # fmt: skip
from veomni.testing.oracle import Truth, truth_of
from veomni.testing.step import Outcome, train_step

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
    "ring2_async2_ddp": (4, lambda: [DDP(), Ulysses(2, overlap=True), ContextParallel(2)]),
    "async2_ddp": (2, lambda: [DDP(), Ulysses(2, overlap=True)]),
    "async2_fsdp1": (2, lambda: [FSDP1(), Ulysses(2, overlap=True)]),
    "async4_fsdp2": (4, lambda: [FSDP2(), Ulysses(4, overlap=True)]),
    "ulysses2_hsdp": (4, lambda: [FSDP2(replicate=2), Ulysses(2)]),
    "ulysses2_fsdp1_hybrid": (4, lambda: [FSDP1(replicate=2), Ulysses(2)]),
    "fsdp2_inputs_offloaded": (1, lambda: [FSDP2(), ActivationCheckpointing(offload=True), TiledMLP(5)]),
    "fsdp2_offload": (2, lambda: FSDP2(cpu_offload=True)),
}

EXPERT_LAYOUTS: dict[str, tuple[int, Callable[[], Any]]] = {
    "ep2_fsdp2": (2, lambda: [FSDP2(), ExpertParallel(2)]),
    "ep2_chunks": (2, lambda: [FSDP2(), ExpertParallel(2, chunks=2)]),
    "ep2_fixed": (2, lambda: [FSDP2(), ExpertParallel(2, exchange="fixed")]),
    "ep2_fsdp2_4": (4, lambda: [FSDP2(), ExpertParallel(2)]),
    "ep2_outside": (4, lambda: [FSDP2(), ExpertParallel(2, placement="strided")]),
    "ep4_chunks": (4, lambda: [FSDP2(), ExpertParallel(4, chunks=2)]),
    "ep4_fixed": (4, lambda: [FSDP2(), ExpertParallel(4, chunks=3, exchange="fixed")]),
    "ep2_hsdp": (4, lambda: [FSDP2(replicate=2), ExpertParallel(2)]),
    "ep2_ulysses2": (4, lambda: [FSDP2(), ExpertParallel(2), Ulysses(2)]),
    "ep4_ulysses2": (4, lambda: [FSDP2(), ExpertParallel(4), Ulysses(2)]),
    "ep4_ring2_ulysses2": (4, lambda: [FSDP2(), ExpertParallel(4), ContextParallel(2), Ulysses(2)]),
    "ep2_fsdp1": (2, lambda: [FSDP1(), ExpertParallel(2)]),
    "ep2_fsdp1_4": (4, lambda: [FSDP1(), ExpertParallel(2, chunks=2)]),
    "ep2_fsdp1_hybrid": (4, lambda: [FSDP1(replicate=2), ExpertParallel(2)]),
    "ep4_fsdp1_ulysses2": (4, lambda: [FSDP1(), ExpertParallel(4), Ulysses(2)]),
    "ep2_offload": (4, lambda: [FSDP2(cpu_offload=True), ExpertParallel(2)]),
    "ep2_ddp": (2, lambda: [DDP(), ExpertParallel(2)]),
    "ep2_ddp_4": (4, lambda: [DDP(), ExpertParallel(2, chunks=2)]),
    "ep2_ddp_strided": (4, lambda: [DDP(), ExpertParallel(2, placement="strided")]),
    "ep2_ddp_ulysses2": (4, lambda: [DDP(), ExpertParallel(2), Ulysses(2)]),
    "ep4_hsdp": (4, lambda: [FSDP2(replicate=2), ExpertParallel(4)]),
    "ep2_keep_gathered": (
        4, lambda: [FSDP2(reshard_after_forward=False, reshard_after_backward=False, prefetch=2), ExpertParallel(2)]
    ),
}  # fmt: skip


def vocabulary(name: str) -> int:
    return int(tiny_config(name).vocab_size)


def oracle(name: str, device: str = "cpu", weights: str = "random", **changes: Any) -> Truth:
    return truth_of(tiny_config(name, **changes), device=device, weights=weights)


def one_step(name: str, layout: str, *, changes: dict[str, Any] | None = None, **options: Any) -> Outcome:
    """What every rank runs; ``changes`` are the configuration's."""
    transforms = {key: options.pop(key) for key in ("recompute", "compile") if key in options}
    strategies = (LAYOUTS | EXPERT_LAYOUTS)[layout][1]
    return train_step(tiny_config(name, **changes or {}), lambda: beside(strategies(), **transforms), **options)


def beside(strategies: Any, *, recompute: str = "none", compile: str = "", balance: bool = False) -> list[Strategy]:
    """Strategies, and transforms of the model beside them; ``compile`` is a backend of compilation."""
    found = [strategies] if isinstance(strategies, Strategy) else list(strategies)
    if recompute != "none":
        found.append(ActivationCheckpointing(recompute))
    return [*found, *([Compile(compile)] if compile else []), *[EncoderBalance()] * balance]
