"""The parallel plan of a model, derived from its modules."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from veomni.models.transformers_api.capabilities import is_pretrained, keeps_fp32, layer_classes
from veomni.ops.experts.layout import holds_experts
from veomni.parallel.plan import ParallelPlan


def derive_plan(model: nn.Module) -> ParallelPlan:
    """Return the parallel plan of any model.

    A model's own ``get_parallel_plan()`` wins. Blocks are otherwise, in this order: its gradient-checkpointing layers
    (transformers' repeated layers, those of vision and audio towers included), the classes transformers says must not
    be split, or repeated children of a ``ModuleList``; of nested ones the outermost.

    Args:
        model: The model, before a strategy wraps it.
    """
    own = getattr(model, "get_parallel_plan", None)
    if callable(own):
        plan: ParallelPlan = own()
        return plan
    return ParallelPlan(blocks=_blocks(model), keep_fp32=_keep_fp32(model), experts=_experts(model))


def _experts(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, module in model.named_modules() if holds_experts(module))


def _blocks(model: nn.Module) -> tuple[str, ...]:
    if is_pretrained(model):
        from transformers import GradientCheckpointingLayer

        classes = layer_classes(model)
        for is_block in (
            lambda module: isinstance(module, GradientCheckpointingLayer),
            lambda module: type(module).__name__ in classes,
        ):
            if names := _outermost(model, is_block):
                return names
    repeated = _repeated_children(model)
    return _outermost(model, lambda module: id(module) in repeated)


def _outermost(model: nn.Module, is_block: Callable[[nn.Module], bool]) -> tuple[str, ...]:
    names: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in names)
        if name and not inside and is_block(module) and next(module.parameters(), None) is not None:
            names.append(name)
    return tuple(names)


def _repeated_children(model: nn.Module) -> set[int]:
    repeated: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            classes = [type(child) for child in module]
            repeated |= {id(child) for child in module if classes.count(type(child)) >= 2}
    return repeated


def _keep_fp32(model: nn.Module) -> tuple[str, ...]:
    names: list[str] = []
    for name, module in model.named_modules():
        own = [f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)]
        inside = any(name.startswith(f"{outer}.") for outer in names)
        if name and not inside and any(keeps_fp32(model, parameter) for parameter in own):
            names.append(name)
    return tuple(names)
