"""What the routers decide for the tokens of one micro-batch on this rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veomni.batch.documents import token_mask
from veomni.batch.micro_batch import MicroBatch
from veomni.errors import DataError, ModelError
from veomni.logging import create_logger
from veomni.moe.load import LoadCounter
from veomni.moe.options import MoEOptions
from veomni.moe.routers import Router, RoutingDecision
from veomni.moe.scoring import probabilities, wide

logger = create_logger(__name__)


class RouterStatistics:
    """Sums over the tokens of a micro-batch, without padding.

    Attributes:
        load: Tokens that every expert was sent.
        probabilities: ``[experts of all routers]``, the sum of every expert's probability.
        z: The sum of ``logsumexp(logits)^2`` over tokens and routers.
        mask: bool ``[tokens]``, those that are not padding; None where all are.

    Args:
        routers: The routers of a model.
        options: ``aux_loss_coef`` is that of the run.
        device: Where they run.
        dtype: What losses are summed in.
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
        """Start from zero for a micro-batch.

        Raises:
            DataError: padding cannot be identified, and the routers are balanced.
        """
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
        """Add a decision.

        Args:
            router: Whose it is.
            decision: The decision.
            load: Count the tokens of experts.
            losses: Sum what the losses are made of.

        Raises:
            ModelError: padding cannot be identified, and the routers are balanced.
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
            raise ModelError(
                f"{problem}: padding cannot be identified",
                "set aux_loss_coef, z_loss_coef and bias_update_rate of the router options to 0",
            )
        logger.warning_once("%s: the load of its experts is counted with padding", router.name)


def _total(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        values = torch.where(mask.view(-1, *[1] * (values.dim() - 1)), values, 0.0)
    return values.sum(dim=0)
