"""The optimizer of a sharded model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from veomni.errors import ModelError
from veomni.optim.groups import build_optimizer_groups
from veomni.optim.lr_scale import scale_lr, split_by_lr_scale
from veomni.optim.multi import combine, members_by_mesh


def setup_optimizer(model: nn.Module, factory: Callable[..., Optimizer], **options: Any) -> Optimizer:
    """Return ``factory`` applied to a model's trainable parameters; see ``Launcher.setup_optimizer``."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError("the optimizer was built before the model was sharded", "call setup_model first")
    no_decay, scales = options.pop("no_decay", ()), options.pop("lr_scale", {})
    groups = build_optimizer_groups(model, weight_decay=options.get("weight_decay", 0.0), no_decay=no_decay)
    groups = split_by_lr_scale(model, groups, scales)
    return scale_lr(combine(members_by_mesh(groups, lambda member: factory(member, **options))))
