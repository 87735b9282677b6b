"""Optimizers, which parameters weight decay applies to, and learning-rate schedules."""

from veomni.optim.adamw_8bit import AdamW8bit
from veomni.optim.adamw_bf16 import AdamWBF16
from veomni.optim.groups import build_optimizer_groups, scale_lr, split_by_lr_scale
from veomni.optim.multi import MultiLRScheduler, MultiOptimizer, combine, members_by_mesh
from veomni.optim.muon import Muon
from veomni.optim.muon_with_adamw import hidden_matrices
from veomni.optim.optimizer import OPTIMIZERS, OptimizerRecipe, OptimizerSection, build_optimizer
from veomni.optim.scheduler import SCHEDULERS, SchedulerSection, Shape, build_scheduler

__all__ = [
    "OPTIMIZERS",
    "SCHEDULERS",
    "AdamW8bit",
    "AdamWBF16",
    "MultiLRScheduler",
    "MultiOptimizer",
    "Muon",
    "OptimizerRecipe",
    "OptimizerSection",
    "SchedulerSection",
    "Shape",
    "build_optimizer",
    "build_optimizer_groups",
    "build_scheduler",
    "combine",
    "hidden_matrices",
    "members_by_mesh",
    "scale_lr",
    "split_by_lr_scale",
]
