"""Optimizers, which parameters weight decay applies to, and learning-rate schedules."""

from veomni.optim.groups import build_optimizer_groups
from veomni.optim.lr_scale import scale_lr, split_by_lr_scale
from veomni.optim.matrices import hidden_matrices
from veomni.optim.multi import MultiLRScheduler, MultiOptimizer, combine, members_by_mesh
from veomni.optim.muon import Muon
from veomni.optim.optimizer import build_optimizer
from veomni.optim.scheduler import build_scheduler, lr_factor

__all__ = [
    "MultiLRScheduler",
    "MultiOptimizer",
    "Muon",
    "build_optimizer",
    "build_optimizer_groups",
    "build_scheduler",
    "combine",
    "hidden_matrices",
    "lr_factor",
    "members_by_mesh",
    "scale_lr",
    "split_by_lr_scale",
]
