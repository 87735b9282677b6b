"""Metrics: FLOPs, throughput, means over held-out data, the progress bar and the plots of a run."""

from veomni.metrics.flops import FlopsCounter, StepFlops
from veomni.metrics.plot import plot_expert_load, plot_loss
from veomni.metrics.progress import Progress
from veomni.metrics.throughput import Throughput

__all__ = ["FlopsCounter", "Progress", "StepFlops", "Throughput", "plot_expert_load", "plot_loss"]
