"""The parallel plan of a model, derived from its modules."""

from collections.abc import Callable

from torch import nn

from veomni.models.transformers_api.capabilities import is_pretrained, keeps_fp32, layer_classes
from veomni.ops.experts.layout import holds_experts
from veomni.parallel.plan import ParallelPlan


def derive_plan(model: nn.Module) -> ParallelPlan:
    """Return the parallel plan of any model, before a strategy wraps it.

    A model's own ``get_parallel_plan()`` wins. Blocks are otherwise, in this order: its gradient-checkpointing layers
    (transformers' repeated layers, those of vision and audio towers included), the classes transformers says must not
    be split, or repeated children of a ``ModuleList``; of nested ones the outermost.
    """
    own = getattr(model, "get_parallel_plan", None)
    if callable(own):
        return own()
    fp32 = {
        id(module)
        for name, module in model.named_modules()
        if any(keeps_fp32(model, f"{name}.{key}") for key, _ in module.named_parameters(recurse=False))
    }
    experts = tuple(name for name, module in model.named_modules() if holds_experts(module))
    return ParallelPlan(_blocks(model), keep_fp32=_outermost(model, lambda module: id(module) in fp32), experts=experts)


def _blocks(model: nn.Module) -> tuple[str, ...]:
    rules: list[Callable[[nn.Module], bool]] = []
    if is_pretrained(model):
        from transformers import GradientCheckpointingLayer

        classes = layer_classes(model)
        rules.append(lambda module: isinstance(module, GradientCheckpointingLayer))
        rules.append(lambda module: type(module).__name__ in classes)
    repeated = _repeated_children(model)
    rules.append(lambda module: id(module) in repeated)
    return next((names for is_block in rules if (names := _outermost(model, is_block))), ())


def _outermost(model: nn.Module, is_one: Callable[[nn.Module], bool]) -> tuple[str, ...]:
    names: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in names)
        if name and not inside and is_one(module) and next(module.parameters(), None) is not None:
            names.append(name)
    return tuple(names)


def _repeated_children(model: nn.Module) -> set[int]:
    repeated: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            classes = [type(child) for child in module]
            repeated |= {id(child) for child in module if classes.count(type(child)) >= 2}
    return repeated
