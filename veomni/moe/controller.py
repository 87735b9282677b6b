"""What the launcher does with the routers of one model: count, balance, check, move the bias, once per step.

The order within a step: :meth:`RouterController.begin_step`, then for every micro-batch a forward inside
:meth:`RouterController.micro_batch`, :meth:`RouterController.before_backward`, the backward, and after the last one
:meth:`RouterController.end_step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from veomni.batch.documents import token_mask
from veomni.batch.micro_batch import MicroBatch
from veomni.errors import DataError, ModelError, NonFiniteError
from veomni.logging import create_logger
from veomni.models.adapter.adapter import ModelAdapter
from veomni.models.adapter.passes.balance_loss import DropBalanceLoss
from veomni.models.transformers_api.experts import own_balance_loss
from veomni.moe.balance import balance_gradient, z_gradient
from veomni.moe.bias import check_bias, check_sharded_bias, move_bias
from veomni.moe.load import ExpertLoad, LoadCounter
from veomni.moe.options import MoEOptions
from veomni.moe.recomputation import recomputing
from veomni.moe.routers import Listener, Router, Routers, Routing
from veomni.moe.scoring import probabilities, wide
from veomni.moe.tap import watch_routers
from veomni.parallel.mesh import ParallelState

logger = create_logger(__name__)


def install_controller(
    model: nn.Module, options: MoEOptions, state: ParallelState, device: torch.device, dtype: torch.dtype
) -> RouterController:
    """Find the routers of a model and watch them; a model without any is left alone.

    Args:
        model: The model, before it is recomputed, compiled and sharded.
        options: What is asked of the routers.
        state: The mesh.
        device: Where the model will run.
        dtype: What losses are summed in.

    Raises:
        ModelError: an option cannot be honoured by this model.
    """
    found = watch_routers(model)
    _check_found(model, found, options)
    own, aux = own_balance_loss(model), options.aux_loss_coef
    if own is not None and found.readable and not found.unreadable:
        aux = own if aux is None else aux
        ModelAdapter.of(model).add(DropBalanceLoss())
        logger.info_rank0("the model's own load-balancing loss, taken on each rank's tokens alone, is off; the one "
                          "taken on the global batch has weight %s", aux)  # fmt: skip
    elif own:
        logger.warning_rank0("the model adds its own load-balancing loss, taken on each rank's tokens alone: "
                             "what its routers decide cannot be read")  # fmt: skip
    for router in found.readable:
        _check_losses(router, aux or 0.0, options.z_loss_coef)
    return RouterController(found.readable, options, aux or 0.0, state, device, dtype)


def _check_found(model: nn.Module, found: Routers, options: MoEOptions) -> None:
    asked = options.asked_for
    if asked is None:
        return
    fix = f"set train.moe.{asked} to 0"
    if found.unreadable:
        raise ModelError(f"what {found.unreadable[0]} of {type(model).__name__} decides cannot be read", fix)
    if not found.readable:
        raise ModelError(f"{type(model).__name__} has no router that train.moe.{asked} could work on", fix)
    for router in found.readable if options.bias_update_rate else ():
        check_bias(router)


def _check_losses(router: Router, aux: float, z: float) -> None:
    if aux and router.balance is None:
        problem = f"{router.name} scores experts in a way that nobody has defined a load-balancing loss for"
        raise ModelError(problem, "set train.moe.aux_loss_coef to 0")
    if z and router.balance == "identity":
        problem = f"{router.name} gives out probabilities, and a z-loss needs logits"
        raise ModelError(problem, "set train.moe.z_loss_coef to 0")


class RouterController(Listener):
    """Watches the routers of one model.

    Attributes:
        load: The load of all experts in the last step; None before the first, and without routers.

    Args:
        routers: The routers; without any, every method does nothing.
        options: What is asked of them.
        aux_loss_coef: Weight of the load-balancing loss.
        state: The mesh.
        device: Where the model runs.
        dtype: What losses are summed in.
    """

    def __init__(
        self,
        routers: Sequence[Router],
        options: MoEOptions,
        aux_loss_coef: float,
        state: ParallelState,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.routers, self.options, self.aux_loss_coef = routers, options, aux_loss_coef
        self.load: ExpertLoad | None = None
        self._state, self._device, self._dtype = state, device, dtype
        self._step, self._micro = LoadCounter(routers, device), LoadCounter(routers, device)
        self._sizes = [router.experts for router in routers]
        sizes = [size for size in self._sizes for _ in range(size)]
        self._size_of_own = torch.tensor(sizes, device=device, dtype=dtype)
        self._probability_sums = torch.zeros(sum(self._sizes), device=device, dtype=dtype)
        self._z_sum = torch.zeros((), device=device, dtype=dtype)
        self._losses = torch.zeros(2, device=device, dtype=dtype)  # balance and z, this rank's share of the step's
        self._fractions: tuple[Tensor, ...] = ()
        self._tokens, self._micro_batches = 1.0, 1
        self._watching = self._counting = self._counted = False
        self._mask: Tensor | None = None
        self._positions: int | None = None
        self._position = {router: position for position, router in enumerate(routers)}
        for router in routers:
            router.listeners.append(self)

    def check(self, model: nn.Module) -> None:
        """Check what can only be known of the model once it is sharded.

        Args:
            model: The model to call, with its wrapper.

        Raises:
            ModelError: a correction bias cannot be moved.
        """
        for router in self.routers if self.options.bias_update_rate else ():
            check_sharded_bias(router, model)

    # ---------------------------------------------------------------- one step

    def begin_step(self, tokens: float, micro_batches: int) -> None:
        """Start to count; ``tokens`` are those of the whole step over all ranks, without padding."""
        self._tokens, self._micro_batches = max(tokens, 1.0), micro_batches
        self._counted, self._fractions = False, ()
        self._step.clear()
        self._losses.zero_()

    @property
    def counts_first(self) -> bool:
        """Whether the experts' load of the step must be known before its first backward."""
        return bool(self.aux_loss_coef) and self.options.balance_scope == "step" and self._micro_batches > 1

    @torch.no_grad()
    def count_first(self, micro_batches: Iterable[MicroBatch], run: Callable[..., Any]) -> None:
        """Count the load of the whole step in a forward of its own: the loss compares experts over all its tokens.

        Args:
            micro_batches: Those of the step.
            run: The model; what is random in it must be drawn again alike afterwards.
        """
        logger.warning_once(
            "the load-balancing loss is one of the whole step: its %s micro-batches run forward once more, to count; "
            "train.moe.balance_scope micro_batch saves that",
            self._micro_batches,
        )
        self._counting = True
        try:
            for inputs in micro_batches:
                with self.micro_batch(inputs):
                    run(inputs)
                self._step.add(self._micro)
        finally:
            self._counting = False
        self._finish_counting()

    @contextmanager
    def micro_batch(self, micro: MicroBatch) -> Iterator[None]:
        """Watch the forward, and the backward, of a micro-batch inside the context."""
        if not self.routers:
            yield
            return
        mask = self._real_tokens(micro)
        self._mask = None if mask is None else mask.flatten().to(self._device, non_blocking=True)
        self._positions = positions_of(micro.inputs)
        self._micro.clear()
        self._probability_sums.zero_()
        self._z_sum.zero_()
        self._watching = True
        try:
            yield
        finally:
            self._watching = False

    def _real_tokens(self, micro: MicroBatch) -> Tensor | None:
        try:
            return token_mask(micro.inputs, micro.rows)
        except DataError as error:
            if self._balances:
                raise
            logger.warning_once("the load of experts is counted with padding: %s", error.problem)
            return None

    @property
    def _balances(self) -> bool:
        return bool(self.aux_loss_coef or self.options.z_loss_coef or self.options.bias_update_rate)

    def before_backward(self) -> None:
        """Make the loads known that the gradients in the coming backward depend on, and add up the losses."""
        if not self.routers:
            return
        if not self._counted:
            self._step.add(self._micro)
            if self.aux_loss_coef and self._micro_batches == 1:
                self._finish_counting()
            elif self.aux_loss_coef:
                self._micro.reduce(self._state.group("loss"))
                self._fractions = self._micro.fractions(self._dtype).split(self._sizes)
        if self.aux_loss_coef:
            share = torch.cat(self._fractions) * self._probability_sums * self._size_of_own
            self._losses[0] += share.sum() / self._per_token
        self._losses[1] += self._z_sum / self._per_token

    def end_step(self) -> None:
        """Finish the step when its gradients are complete and no parameter has changed yet.

        Raises:
            NonFiniteError: a router's logits are not finite; raised on all ranks.
        """
        if not self.routers:
            return
        if not self._counted:
            self._finish_counting()
        if self.aux_loss_coef or self.options.z_loss_coef:
            dist.all_reduce(self._losses, group=self._state.group("loss"))
        self._refuse_broken()
        loads = tuple(load.clone() for load in self._step.by_router())
        for router, load in zip(self.routers, loads, strict=True):
            if self.options.bias_update_rate:
                move_bias(router, load, self.options.bias_update_rate)
        self.load = ExpertLoad(tuple(router.name for router in self.routers), loads)

    def metrics(self) -> dict[str, Tensor]:
        """Return the losses of the last step (not yet multiplied by their weights), and how uneven its load was."""
        if self.load is None:
            return {}
        numbers = {}
        if self.aux_loss_coef:
            numbers["aux_loss"] = self._losses[0].clone()
        if self.options.z_loss_coef:
            numbers["z_loss"] = self._losses[1].clone()
        if self.options.log_load_every is not None:
            violations = self.load.violations()
            numbers["expert_load_max_violation"] = violations.max()
            numbers["expert_load_mean_violation"] = violations.mean()
        return numbers

    def load_due(self, step: int) -> ExpertLoad | None:
        """Return the load of the last step if it is to be reported at ``step``."""
        every = self.options.log_load_every
        return self.load if every is not None and step % every == 0 else None

    @property
    def _per_token(self) -> float:
        return self._tokens * len(self.routers)

    def _finish_counting(self) -> None:
        self._step.reduce(self._state.group("loss"))
        self._fractions = self._step.fractions(self._dtype).split(self._sizes)
        self._counted = True

    def _refuse_broken(self) -> None:
        broken = self._step.broken.tolist()  # the one value the host waits for in a step
        names = [router.name for router, count in zip(self.routers, broken, strict=True) if count]
        if names:
            raise NonFiniteError(
                f"the router logits of {', '.join(names[:3])}{' and others' if len(names) > 3 else ''} are not finite "
                f"({max(broken)} tokens): the step was refused on all ranks and no parameter changed; look at the last "
                "batch, the learning rate and the precision"
            )

    # ---------------------------------------------------------------- in the forward and backward

    @override
    def see(self, router: Router, routing: Routing, training: bool) -> None:
        # What is recomputed has been counted.
        if self._watching and (training or self._counting) and not recomputing():
            self._collect(router, routing)

    @torch.no_grad()
    def _collect(self, router: Router, routing: Routing) -> None:
        position, tokens = self._position[router], len(routing.indices)
        mask = self._mask
        if self._positions not in (None, tokens):
            self._refuse_subset(router, tokens)
            mask = None
        if not self._counted:
            self._micro.count(position, routing, mask)
        if self._counting:
            return
        logits = wide(routing.logits)
        if self.aux_loss_coef:
            assert router.balance is not None
            shares = probabilities(router.balance, logits)
            self._probability_sums.split(self._sizes)[position].add_(_total(shares, mask))
        if self.options.z_loss_coef:
            self._z_sum += _total(logits.logsumexp(dim=-1).square(), mask)

    def _refuse_subset(self, router: Router, tokens: int) -> None:
        problem = f"{router.name} routes {tokens} tokens of a micro-batch of {self._positions}"
        if self._balances:
            raise ModelError(
                f"{problem}: nobody knows which of them are padding",
                "set train.moe.aux_loss_coef, z_loss_coef and bias_update_rate to 0",
            )
        logger.warning_once("%s: the load of its experts is counted with padding", router.name)

    @override
    def gradient(self, router: Router, logits: Tensor) -> Tensor | None:
        if not self._watching or not (self.aux_loss_coef or self.options.z_loss_coef):
            return None
        total = torch.zeros_like(logits)
        if self.aux_loss_coef:
            assert self._fractions, "call launcher.backward, not loss.backward: it makes the experts' load known"
            assert router.balance is not None
            fractions = self._fractions[self._position[router]]
            total += self.aux_loss_coef * balance_gradient(router.balance, logits, fractions)
        if self.options.z_loss_coef:
            total += self.options.z_loss_coef * z_gradient(logits)
        if self._mask is not None:
            total = torch.where(self._mask[:, None], total, 0.0)
        return total * (self._state.size("loss") / self._per_token)  # strategies average over that view


def positions_of(inputs: Mapping[str, Any]) -> int | None:
    """Return how many positions a micro-batch holds on this rank, padding included; None where it does not say."""
    for name in ("input_ids", "inputs_embeds"):
        value = inputs.get(name)
        if isinstance(value, Tensor):
            return int(value.shape[0] * value.shape[1])
    return None


def _total(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        values = torch.where(mask.view(-1, *[1] * (values.dim() - 1)), values, 0.0)
    return values.sum(dim=0)
