"""Which modules of blocks are dense MLPs: products and activations that compute each token independently."""

import inspect
import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from veomni.parallel.plan import ParallelPlan

_TOKENS = 5


def find_mlps(model: nn.Module, plan: ParallelPlan) -> Iterator[str]:
    """Yield the names of dense MLPs inside blocks, outside of experts, outermost first.

    Such a module takes one tensor and returns one of the same shape. A copy with few channels is run in training mode
    to test whether tokens mix; a module that cannot be copied that way does not count, nor one whose forward, or that
    of a layer in it (Float8), was replaced.
    """
    for block in plan.blocks:
        found: list[str] = []
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            inside = any(name.startswith(f"{outer}.") for outer in (*found, *plan.experts))
            if not inside and name not in plan.experts and name != block and _is_mlp(module):
                found.append(name)
                yield name


def copy_with(module: nn.Module, replaced: Mapping[Any, Any]) -> nn.Module:
    """Copy a module with some of its layers or tensors replaced; attributes of other kinds are shared."""
    plain = [value for each in module.modules() for name, value in vars(each).items() if not name.startswith("_")]
    return deepcopy(module, {id(value): value for value in plain} | {id(old): new for old, new in replaced.items()})


def _is_mlp(module: nn.Module) -> bool:
    if any("forward" in vars(each) for each in module.modules()) or next(module.buffers(), None) is not None:
        return False
    holders = [each for each in module.modules() if next(each.parameters(recurse=False), None) is not None]
    layers = [each for each in holders if type(each) is nn.Linear]
    takes_one = len(inspect.signature(module.forward).parameters) == 1
    return takes_one and len(layers) > 1 and len(layers) == len(holders) and _is_tokenwise(module, layers)


def _is_tokenwise(module: nn.Module, layers: list[nn.Linear]) -> bool:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)
        unit = math.gcd(*(size for layer in layers for size in (layer.in_features, layer.out_features)))
        small = copy_with(module, {layer: _narrow(layer, unit) for layer in layers}).train()
        rows = torch.randn(_TOKENS, layers[0].in_features // unit)
        try:
            whole, again, apart = small(rows), small(rows), [small(row) for row in rows.split(1)]
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            return False
        if not isinstance(whole, torch.Tensor) or whole.shape != rows.shape:
            return False
        return torch.equal(whole, again) and torch.allclose(whole, torch.cat(apart), atol=1e-6)


def _narrow(layer: nn.Linear, unit: int) -> nn.Linear:
    return nn.Linear(layer.in_features // unit, layer.out_features // unit, layer.bias is not None, device="cpu")
