"""How many tokens every expert was sent, layer by layer, over all ranks and micro-batches of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from veomni.moe.routers import Router, RoutingDecision


class LoadCounter:
    """Counts on the device, without waiting for it: one vector, which one reduction sums over ranks.

    Attributes:
        assignments: int64 ``[experts of all routers]``, the tokens sent to each expert.
        tokens: int64 ``[routers]``, the tokens that were routed.
        nonfinite: int64 ``[routers]``, those of them with logits that are not finite.
        sizes: Experts of every router.

    Args:
        routers: The routers whose decisions are counted.
        device: Where they run.
    """

    def __init__(self, routers: Sequence[Router], device: torch.device) -> None:
        self.sizes = [router.experts for router in routers]
        total, count = sum(self.sizes), len(routers)
        self._all = torch.zeros(total + 2 * count, dtype=torch.int64, device=device)
        self.assignments, self.tokens, self.nonfinite = self._all.split([total, count, count])
        sizes = torch.tensor(self.sizes, dtype=torch.int64)
        self._owners = torch.arange(count).repeat_interleave(sizes).to(device)
        self._experts = sizes.repeat_interleave(sizes).to(device)

    def count(self, index: int, decision: RoutingDecision, mask: Tensor | None) -> None:
        """Add the decisions of router ``index``; ``mask``, bool ``[tokens]``, leaves out padding."""
        real = torch.ones_like(decision.indices[:, 0], dtype=torch.bool) if mask is None else mask
        sent = real[:, None].expand_as(decision.indices).long()
        self.by_router()[index].scatter_add_(0, decision.indices.flatten().long(), sent.flatten())
        self.tokens[index] += real.sum()
        self.nonfinite[index] += (real & ~decision.logits.isfinite().all(dim=-1)).sum()

    def by_router(self) -> tuple[Tensor, ...]:
        """Return the assignments of every router, int64 ``[experts]`` each, as views."""
        return self.assignments.split(self.sizes)

    def relative(self, dtype: torch.dtype) -> Tensor:
        """Return assignments per token of their router, times its experts: ``top_k`` for all in perfect balance."""
        return self._experts * (self.assignments.to(dtype) / self.tokens.clamp(min=1).to(dtype)[self._owners])

    def add(self, other: LoadCounter) -> None:
        """Add what another counter of the same routers has counted."""
        self._all += other._all

    def reduce(self, group: dist.ProcessGroup) -> None:
        """Sum over the ranks of a group."""
        dist.all_reduce(self._all, group=group)

    def clear(self) -> None:
        """Start again from zero."""
        self._all.zero_()


@dataclass(frozen=True)
class ExpertLoad:
    """The load of all experts in one step.

    Attributes:
        names: Names of the routers.
        assignments: For every router int64 ``[experts]``, the tokens sent to each expert.
    """

    names: tuple[str, ...]
    assignments: tuple[Tensor, ...]

    def violations(self) -> Tensor:
        """Return ``max load / mean load - 1`` of every router, ``[routers]``: 0 is perfect balance.

        It is "MaxVio" of arXiv:2408.15664, section 4.1. A router that routed nothing has 0.
        """
        loads = [counts.float() for counts in self.assignments]
        ratios = [load.max() / load.mean().clamp(min=torch.finfo(torch.float32).tiny) for load in loads]
        return (torch.stack(ratios) - 1).clamp(min=0)
