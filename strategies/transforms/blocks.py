"""Transforms of every block: activation checkpointing and compilation."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from typing_extensions import override

from veomni.batch.forward_call import bind_call
from veomni.compat.attention_kernels import attention_operations
from veomni.compat.modules import compile_in_place, float8_product, run_within
from veomni.config.section import Validated
from veomni.logging import create_logger
from veomni.ops.host_stack import HostStack
from veomni.strategies.base import SetupContext, Stage, Strategy
from veomni.strategies.transforms.float64 import keep_float64
from veomni.strategies.transforms.offload import InputOffload

if TYPE_CHECKING:
    from veomni.models.adapter.adapter import ModelAdapter

logger = create_logger(__name__)

Recompute = Literal["full", "selective"]

_KEPT = frozenset({"veomni::expert_up", "veomni::exchange_evenly", "veomni::ring_attention"})
"""Operations of this package whose results selective activation checkpointing keeps.

The experts' first product is kept, and the second is recomputed. Exchanges are those of attention.
"""
_MATMULS = frozenset(
    {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default, float8_product()}
)


@dataclass(eq=False)
class ActivationCheckpointing(Validated, Strategy):
    """Recompute the activations of every block in the backward.

    Args:
        mode: "full" keeps only a block's input. "selective" also keeps attention, with what it exchanged between ranks,
            the first product of experts, and every second matrix product, the per-operation policy of torchtitan: most
            of the memory for a third of the recomputation.
        offload: Keep the inputs of blocks in host memory, copied while the device computes; about three of them are on
            the device at once.
    """

    name = "activation_checkpointing"
    stage = Stage.RECOMPUTATION

    mode: Recompute = "full"
    offload: bool = False

    @override
    def transform(self, adapter: ModelAdapter, context: SetupContext) -> None:
        offload = InputOffload(HostStack(context.device)) if self.offload else None
        for name in context.plan.blocks:
            block = adapter.model.get_submodule(name)
            adapter.patch(block, "forward", checkpointed(block.forward, self.mode))
            if offload is not None:
                adapter.on_remove(run_within(block, offload))


def checkpointed(forward: Callable[..., Any], mode: Recompute) -> Callable[..., Any]:
    """Return ``forward`` with its activations recomputed in the backward."""
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = lambda: create_selective_checkpoint_contexts(_SaveEverySecondMatmul())

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # A compiled graph contains its recomputation; around a context variable Dynamo would not compile the block.
        body = forward if torch.compiler.is_compiling() else bind_call(keep_float64(forward))
        return checkpoint(body, *args, **options, **kwargs)

    return run


class _SaveEverySecondMatmul:
    """A policy with counters: the forward and its recomputation are counted separately, so they decide alike."""

    def __init__(self) -> None:
        self._matmuls: Counter[bool] = Counter()
        self._attention = attention_operations()

    def __call__(self, context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operation in self._attention or operation.name() in _KEPT:
            return CheckpointPolicy.MUST_SAVE
        if operation in _MATMULS:
            self._matmuls[context.is_recompute] += 1
            if self._matmuls[context.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE


@dataclass(eq=False)
class Compile(Validated, Strategy):
    """Compile every block with ``torch.compile``, each at its first call. An fp64 run stays uncompiled.

    Block by block, the same graph serves every layer, and sharding hooks stay outside of it.

    Args:
        backend: The backend of ``torch.compile``.
    """

    name = "compile"
    stage = Stage.COMPILATION

    backend: str = "inductor"

    @override
    def transform(self, adapter: ModelAdapter, context: SetupContext) -> None:
        if context.precision.name == "fp64":
            # TorchDynamo skips code inside a TorchDispatchMode, and logs nothing.
            logger.warning_rank0("Compile has no effect in fp64: the mode that keeps float64 cannot be compiled")
            return
        for name in context.plan.blocks:
            adapter.on_remove(compile_in_place(adapter.model.get_submodule(name), self.backend))
