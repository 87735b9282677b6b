"""Which implementation a model's experts run with."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veomni.logging import create_logger
from veomni.models import hf
from veomni.ops.expert_exchange import EXCHANGE, exchange_experts
from veomni.ops.experts.permute import combine_rows, permute_tokens
from veomni.ops.experts.routing import route
from veomni.ops.experts.rows import expert_rows
from veomni.precision import Precision

logger = create_logger(__name__)


def resolve_experts(model: nn.Module, precision: Precision) -> None:
    """Run mixture-of-experts layers with a kernel that computes in the precision of the run.

    Grouped matrix products compute in bfloat16 only; a loop over experts has no such limit.

    Args:
        model: Any model; those without experts are left alone.
        precision: The precision of the run.
    """
    if not hf.has_experts(model):
        return
    backend = "grouped_mm" if precision.compute is torch.bfloat16 else "loop"
    name = f"veomni_{backend}"
    hf.register_experts(name, partial(run_experts, backend=backend))
    hf.use_experts(model, name)
    logger.info_rank0("experts: %s", backend)


def run_experts(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, backend: str
) -> Tensor:
    """Return each token's weighted sum over its experts, ``[tokens, hidden]``, wherever those are.

    Args:
        module: A transformers experts module.
        hidden_states: ``[tokens, hidden]``.
        top_k_index: int64 ``[tokens, k]``.
        top_k_weights: ``[tokens, k]``.
        backend: "loop" or "grouped_mm".
    """
    experts: Any = module
    run = partial(expert_rows, module, backend=backend)
    exchange = getattr(module, EXCHANGE, None)
    if exchange is not None:
        return exchange_experts(hidden_states, top_k_index, top_k_weights, experts.num_experts, run, exchange)
    routing = route(top_k_index, experts.num_experts)
    rows = run(permute_tokens(hidden_states, routing, top_k_index.shape[1]), routing.offsets)
    return combine_rows(rows, routing, top_k_weights)
