"""Optimizers, which parameters weight decay applies to, and learning-rate schedules."""

from veomni.optim.groups import build_optimizer_groups
from veomni.optim.optimizer import build_optimizer
from veomni.optim.scheduler import build_scheduler, lr_factor

__all__ = ["build_optimizer", "build_optimizer_groups", "build_scheduler", "lr_factor"]
