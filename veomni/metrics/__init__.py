"""Metrics: FLOPs, throughput, evaluation, the progress bar and the plots of a run."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from veomni.metrics.expert_load import plot_expert_load
from veomni.metrics.flops import FlopsCounter, StepFlops
from veomni.metrics.plot import plot_loss
from veomni.metrics.progress import Progress
from veomni.metrics.throughput import Throughput

if TYPE_CHECKING:
    from veomni.metrics.answers import AnswerAccuracy
    from veomni.metrics.perplexity import TokenPerplexity

__all__ = [
    "AnswerAccuracy",
    "FlopsCounter",
    "Progress",
    "StepFlops",
    "Throughput",
    "TokenPerplexity",
    "plot_expert_load",
    "plot_loss",
]

_SLOW = {"AnswerAccuracy": "veomni.metrics.answers", "TokenPerplexity": "veomni.metrics.perplexity"}
"""What needs torchmetrics, which takes seconds to import."""


def __getattr__(name: str) -> Any:
    if name not in _SLOW:
        raise AttributeError(f"module 'veomni.metrics' has no attribute {name!r}")
    return getattr(import_module(_SLOW[name]), name)
