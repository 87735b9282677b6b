"""Which implementation a model's experts run with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from veomni.logging import create_logger
from veomni.models.adapter.adapter import ModelAdapter
from veomni.models.transformers_api.experts import has_experts, register_experts, use_experts
from veomni.ops.experts.backends import choose_backend
from veomni.ops.experts.forward import experts_forward
from veomni.ops.experts.layout import ACTIVATION, find_activation, holds_experts

if TYPE_CHECKING:
    from veomni.strategies.transforms.precision import Precision

logger = create_logger(__name__)

def resolve_experts(model: nn.Module, precision: Precision, available: Sequence[str]) -> None:
    """Run mixture-of-experts layers with the fastest backend that computes in the precision of the run.

    Args:
        model: Any model; those without experts are left alone.
        precision: The precision of the run.
        available: The backends of the device, fastest first.

    Raises:
        ModelError: the requested backend cannot run the model here.
    """
    if not has_experts(model):
        return
    modules = [module for module in model.modules() if holds_experts(module)]
    adapter = ModelAdapter.of(model)
    for module in modules:  # now: it cannot be tried out in a compiled forward
        adapter.patch(module, ACTIVATION, find_activation(module))
    backend = choose_backend(modules, adapter.experts, available, precision.compute)
    name = f"veomni_{backend}"
    register_experts(name, partial(experts_forward, backend=backend))
    use_experts(model, name)
    logger.info_rank0("experts: %s", backend)
