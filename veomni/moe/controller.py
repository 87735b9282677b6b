"""What happens to the routers of one model in a step: count, balance, check, move the bias.

The order: ``begin_step``, for every micro-batch a forward inside ``micro_batch`` and ``before_backward``, ``end_step``.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from typing_extensions import override

from veomni.batch.micro_batch import MicroBatch
from veomni.compat.modules import in_backward
from veomni.errors import ModelError, NonFiniteError
from veomni.logging import create_logger
from veomni.moe.load import ExpertLoad, LoadCounter, RouterStatistics
from veomni.moe.options import MoEOptions
from veomni.moe.routers import Router, RouterHook, Routers, RoutingDecision
from veomni.moe.scoring import balance_gradient, z_gradient
from veomni.ops.host_copy import HostCopy
from veomni.parallel.mesh import ParallelState

logger = create_logger(__name__)


class RouterController(RouterHook):
    """Balances and reports the readable ``routers`` (at least one) of one model, which are hooked; ``found`` are all.

    ``load`` is the load of all experts in the last step; None before the first.
    """

    def __init__(
        self, found: Routers, options: MoEOptions, state: ParallelState, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.found, self.routers, self.options = found, found.readable, options
        self.load: ExpertLoad | None = None
        self._state, self._dtype = state, dtype
        self._step = LoadCounter(self.routers, device)
        self._micro = RouterStatistics(self.routers, options, device, dtype)
        self._losses = torch.zeros(2, device=device, dtype=dtype)  # balance and z, this rank's share of the step's
        self._relative_load: tuple[Tensor, ...] = ()
        self._nonfinite: HostCopy | None = None
        self._per_token, self._micro_batches = 1.0, 1
        self._inside = self._counting = self._counted = False
        for router in self.routers:
            router.hooks.append(self)

    @property
    def mask(self) -> Tensor | None:
        """The tokens of the current micro-batch that are not padding, bool ``[tokens]``; None where all are."""
        return self._micro.mask

    def check(self, model: nn.Module) -> None:
        """Check the wrapped model; a ModelError if FSDP1's flat parameters hold a correction bias to be moved."""
        for router in self.routers if self.options.bias_update_rate else ():
            if isinstance(router.bias_values, nn.Parameter) and isinstance(model, FullyShardedDataParallel):
                problem = f"the correction bias of {router.name} is a parameter, and fsdp1 flattens parameters"
                raise ModelError(problem, "use FSDP2, or aux_loss_coef instead of bias_update_rate")

    # ---------------------------------------------------------------- one step

    def begin_step(self, tokens: float, micro_batches: int) -> None:
        """Start to count; ``tokens`` are those of the whole step over all ranks, without padding."""
        self._per_token, self._micro_batches = max(tokens, 1.0) * len(self.routers), micro_batches
        self._counted, self._relative_load = False, ()
        self._step.clear()
        self._losses.zero_()

    @property
    def counts_first(self) -> bool:
        """Whether the experts' load of the step must be known before its first backward."""
        return bool(self.options.aux_loss_coef) and self.options.balance_scope == "step" and self._micro_batches > 1

    @torch.no_grad()
    def count_first(self, micro_batches: Iterable[MicroBatch], run: Callable[..., Any]) -> None:
        """Count the load of the whole step in a forward of its own: the loss compares experts over all its tokens.

        ``run`` calls the model on one; what is random in it must be drawn again alike afterwards.
        """
        logger.warning_once(
            "the load-balancing loss is one of the whole step: its %s micro-batches run forward once more, to count; "
            "balance_scope 'micro_batch' saves that",
            self._micro_batches,
        )
        self._counting = True
        try:
            for inputs in micro_batches:
                with self.micro_batch(inputs):
                    run(inputs)
                self._step.add(self._micro.load)
        finally:
            self._counting = False
        self._finish_counting()

    @contextmanager
    def micro_batch(self, micro: MicroBatch) -> Iterator[None]:
        """Observe the forward, and the backward, of a micro-batch inside the context."""
        self._micro.begin(micro)
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def before_backward(self, last: bool) -> None:
        """Sum the loads that the gradients in the coming backward depend on, and add up the losses.

        The ``last`` one of a step also queues the copy of what :meth:`end_step` reads, ahead of the backward, which
        does not change it: the host never waits for the backward.
        """
        balances = bool(self.options.aux_loss_coef)
        if not self._counted:
            self._step.add(self._micro.load)
            if last:
                self._finish_counting()
            if balances and self._micro_batches > 1:
                self._share(self._micro.load)
        if last:
            self._nonfinite = HostCopy(self._step.nonfinite)
        if balances:
            self._losses[0] += (torch.cat(self._relative_load) * self._micro.probabilities).sum() / self._per_token
        self._losses[1] += self._micro.z / self._per_token

    def end_step(self) -> None:
        """Finish the step when its gradients are complete and no parameter has changed yet.

        Logits of a router that are not finite are a NonFiniteError on all ranks.
        """
        if self.options.aux_loss_coef or self.options.z_loss_coef:
            dist.all_reduce(self._losses, group=self._state.group("loss"))
        self._check_finite()
        loads = tuple(load.clone() for load in self._step.by_router())
        for router, load in zip(self.routers, loads, strict=True):
            if self.options.bias_update_rate:
                router.move_bias(load, self.options.bias_update_rate)
        self.load = ExpertLoad(tuple(router.name for router in self.routers), loads)

    def metrics(self) -> dict[str, Tensor]:
        """Return the losses of the last step (not yet multiplied by their weights), and how uneven its load was."""
        if self.load is None:
            return {}
        numbers = {}
        if self.options.aux_loss_coef:
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

    def _finish_counting(self) -> None:
        self._share(self._step)
        self._counted = True

    def _share(self, load: LoadCounter) -> None:
        """Sum a load over the ranks; the coming backward balances on it."""
        load.reduce(self._state.group("loss"))
        self._relative_load = load.relative(self._dtype).split(load.sizes)

    def _check_finite(self) -> None:
        assert self._nonfinite is not None
        counts = self._nonfinite.read().tolist()
        names = [router.name for router, count in zip(self.routers, counts, strict=True) if count]
        if names:
            raise NonFiniteError(
                f"the router logits of {', '.join(names[:3])}{' and others' if len(names) > 3 else ''} are not finite "
                f"({max(counts)} tokens): the step was stopped on all ranks and no parameter changed; look at the last "
                "batch, the learning rate and the precision"
            )

    # ---------------------------------------------------------------- in the forward and backward

    @override
    def observe(self, router: Router, decision: RoutingDecision, training: bool) -> None:
        # What is recomputed has been counted.
        if self._inside and (training or self._counting) and not in_backward():
            self._micro.add(router, decision, load=not self._counted, losses=not self._counting)

    @override
    def gradient(self, router: Router, logits: Tensor) -> Tensor | None:
        aux, z = self.options.aux_loss_coef, self.options.z_loss_coef
        if not self._inside or not (aux or z):
            return None
        total = torch.zeros_like(logits)
        if aux:
            if not self._relative_load:
                problem = "the experts' load is not known in the backward"
                raise ModelError(problem, "call launcher.backward(loss, micro) instead of loss.backward()")
            assert router.balance is not None
            total += aux * balance_gradient(router.balance, logits, self._relative_load[router.index])
        if z:
            total += z * z_gradient(logits)
        if self.mask is not None:
            total = torch.where(self.mask[:, None], total, 0.0)
        return total * (self._state.size("loss") / self._per_token)  # strategies average over that view
