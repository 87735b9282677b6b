"""The load-balancing loss that a model would add to its own loss."""

from __future__ import annotations

from veomni.batch.forward_call import ForwardCall
from veomni.models.adapter.adapter import InputPass, Stage


class DropBalanceLoss(InputPass):
    """Keeps a transformers model from adding a load-balancing loss of its own; its configuration is not changed."""

    stage = Stage.LOSS

    def before(self, call: ForwardCall) -> None:
        """Let the model return no logits of routers, which is what it takes that loss on."""
        call.kwargs["output_router_logits"] = False
