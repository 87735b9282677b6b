"""How a run balances and reports its routers."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from veomni.config.section import Validated


@dataclass(frozen=True)
class MoEOptions(Validated):
    """How experts are kept equally busy, and how often their load is reported.

    Attributes:
        aux_loss_coef: Weight of the load-balancing loss over the global batch; null takes the model configuration's
            ``router_aux_loss_coef`` where that says ``output_router_logits``, and is 0 elsewhere.
        z_loss_coef: Weight of the router z-loss over the global batch.
        bias_update_rate: Step by which the correction bias of every expert moves towards equal load, to balance without
            a loss.
        balance_scope: Tokens that the load-balancing loss compares experts over: those of the whole optimizer step, or
            of one micro-batch on all ranks. step, with several micro-batches, runs them forward once more to count.
        log_load_every: Steps between lines of expert_load.jsonl; null reports no load.
    """

    aux_loss_coef: Annotated[float, Ge(0.0)] | None = None
    z_loss_coef: Annotated[float, Ge(0.0)] = 0.0
    bias_update_rate: Annotated[float, Ge(0.0)] = 0.0
    balance_scope: Literal["step", "micro_batch"] = "step"
    log_load_every: Annotated[int, Ge(1)] | None = 10

    @property
    def needs_routers(self) -> str | None:
        """The name of an option that only a model with readable routers satisfies, or None."""
        names = ("aux_loss_coef", "z_loss_coef", "bias_update_rate")
        return next((name for name in names if getattr(self, name)), None)
