"""Metrics: FLOPs, throughput, evaluation, the progress bar and the plots of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from veomni.metrics.expert_load import plot_expert_load
from veomni.metrics.flops import FlopsCounter, StepFlops
from veomni.metrics.plot import plot_loss
from veomni.metrics.progress import Progress
from veomni.metrics.throughput import Throughput

if TYPE_CHECKING:
    from veomni.metrics.evaluation import TokenPerplexity

__all__ = ["FlopsCounter", "Progress", "StepFlops", "Throughput", "TokenPerplexity", "plot_expert_load", "plot_loss"]


def __getattr__(name: str) -> Any:
    if name != "TokenPerplexity":
        raise AttributeError(f"module 'veomni.metrics' has no attribute {name!r}")
    from veomni.metrics.evaluation import TokenPerplexity  # torchmetrics takes seconds to import

    return TokenPerplexity
