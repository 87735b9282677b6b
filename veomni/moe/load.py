"""What the routers decided for the tokens of a micro-batch and of a step: the load of every expert, and losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from veomni.batch.documents import token_mask
from veomni.batch.micro_batch import MicroBatch
from veomni.errors import DataError, ModelError
from veomni.logging import create_logger
from veomni.moe.options import MoEOptions
from veomni.moe.routers import Router, RoutingDecision
from veomni.moe.scoring import probabilities, wide

logger = create_logger(__name__)


class LoadCounter:
    """Counts on the device, without waiting for it: one vector, which one reduction sums over ranks.

    Int64 ``[experts of all routers]`` ``assignments`` are the tokens sent to each expert, ``[routers]`` ``tokens``
    those that were routed, ``nonfinite`` those of them with logits that are not finite. ``sizes`` are experts of every
    router.
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


class RouterStatistics:
    """Sums over this rank's tokens of a micro-batch, without padding.

    ``probabilities`` are ``[experts of all routers]``, the sum of every expert's probability; ``z`` is the sum of
    ``logsumexp(logits)^2`` over tokens and routers; ``mask``, bool ``[tokens]``, is None where no token is padding.
    """

    def __init__(
        self, routers: Sequence[Router], options: MoEOptions, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.options, self._device = options, device
        self.load = LoadCounter(routers, device)
        self.probabilities = torch.zeros(sum(self.load.sizes), device=device, dtype=dtype)
        self.z = torch.zeros((), device=device, dtype=dtype)
        self.mask: Tensor | None = None
        self._positions: int | None = None

    def begin(self, micro: MicroBatch) -> None:
        """Start from zero; a DataError if padding cannot be identified and the routers are balanced."""
        mask = self._real_tokens(micro)
        self.mask = None if mask is None else mask.flatten().to(self._device, non_blocking=True)
        rows = [micro.inputs[name] for name in ("input_ids", "inputs_embeds") if micro.inputs.get(name) is not None]
        self._positions = rows[0].shape[:2].numel() if rows else None
        self.load.clear()
        self.probabilities.zero_()
        self.z.zero_()

    def _real_tokens(self, micro: MicroBatch) -> Tensor | None:
        try:
            return token_mask(micro.inputs, micro.rows)
        except DataError as error:
            if self.options.needs_routers:
                raise
            logger.warning_once("the load of experts is counted with padding: %s", error.problem)
            return None

    @torch.no_grad()
    def add(self, router: Router, decision: RoutingDecision, *, load: bool, losses: bool) -> None:
        """Count the tokens of experts, and sum what the losses are made of.

        It is a ModelError if padding cannot be identified and the routers are balanced.
        """
        mask, tokens = self.mask, len(decision.indices)
        if self._positions not in (None, tokens):
            self._check_subset(router, tokens)
            mask = None
        if load:
            self.load.count(router.index, decision, mask)
        logits = wide(decision.logits)
        if losses and self.options.aux_loss_coef:
            assert router.balance is not None
            shares = probabilities(router.balance, logits)
            self.probabilities.split(self.load.sizes)[router.index].add_(_total(shares, mask))
        if losses and self.options.z_loss_coef:
            self.z += _total(logits.logsumexp(dim=-1).square(), mask)

    def _check_subset(self, router: Router, tokens: int) -> None:
        problem = f"{router.name} routes {tokens} tokens of a micro-batch of {self._positions}"
        if self.options.needs_routers:
            problem = f"{problem}: padding cannot be identified"
            raise ModelError(problem, "set aux_loss_coef, z_loss_coef and bias_update_rate of the router options to 0")
        logger.warning_once("%s: the load of its experts is counted with padding", router.name)


def _total(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        values = torch.where(mask.view(-1, *[1] * (values.dim() - 1)), values, 0.0)
    return values.sum(dim=0)


@dataclass(frozen=True)
class ExpertLoad:
    """The load of all experts in one step: for every router of ``names`` int64 ``[experts]``, tokens of each expert."""

    names: tuple[str, ...]
    assignments: tuple[Tensor, ...]

    def violations(self) -> Tensor:
        """Return ``max load / mean load - 1`` of every router, ``[routers]``: 0 is perfect balance.

        It is "MaxVio" of arXiv:2408.15664, section 4.1. A router that routed nothing has 0.
        """
        loads = [counts.float() for counts in self.assignments]
        ratios = [load.max() / load.mean().clamp(min=torch.finfo(torch.float32).tiny) for load in loads]
        return (torch.stack(ratios) - 1).clamp(min=0)
