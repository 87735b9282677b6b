"""Which implementation a model's experts run with."""

from __future__ import annotations

from torch import nn

from veomni.logging import create_logger
from veomni.models import hf
from veomni.precision import Precision

logger = create_logger(__name__)


def resolve_experts(model: nn.Module, precision: Precision) -> None:
    """Run mixture-of-experts layers with a kernel that computes in the precision of the run.

    transformers' default, grouped matrix products, has no float64 kernel; its loop over experts has no such limit.

    Args:
        model: Any model; those without experts are left alone.
        precision: The precision of the run.
    """
    if precision.name == "fp64" and hf.has_experts(model):
        hf.use_experts(model, "eager")
        logger.info_rank0("experts: eager, the only implementation in float64")
