"""The parallel plan of a model, derived from its modules."""

from collections import Counter
from collections.abc import Callable
from typing import Any

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
    outermost = _outermost(model, lambda module: id(module) in fp32)
    embeddings, heads = _ends(model, outermost)
    return ParallelPlan(_blocks(model), outermost, experts, embeddings, heads)


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


def _ends(model: Any, apart: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of embedding and head: of those that are plain layers, with a weight that nothing else holds."""
    if not is_pretrained(model):
        return (), ()
    try:
        ends = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:  # transformers does not know them, and the model does not name them
        return (), ()
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    names = {id(module): name for name, module in model.named_modules() if name not in apart}

    def own(module: nn.Module | None, kind: type[nn.Module]) -> tuple[str, ...]:
        plain = type(module) is kind and all(holders[id(each)] == 1 for each in module.parameters())
        return (names[id(module)],) if plain and id(module) in names else ()

    return own(ends[0], nn.Embedding), own(ends[1], nn.Linear)


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
