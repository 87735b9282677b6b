"""Hooks between a router and its experts: one operation, opaque to ``torch.compile``, since hooks change between steps.

Its backward gives the logits, which nothing uses after the choice was made, the gradients of losses on them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from veomni.models.adapter.adapter import ModelAdapter, replace_attribute
from veomni.moe.routers import Router, Routers, RoutingDecision, find_routers
from veomni.moe.scoring import wide

_KEY = "_veomni_router_key"
_POSITIONS = "_veomni_router_positions"
_hooked: WeakValueDictionary[int, Router] = WeakValueDictionary()
"""Routers by the key that is the operation's argument: it takes tensors and numbers only."""


def hook_routers(routers: Routers) -> list[Callable[[], None]]:
    """Call the hooks of routers with every decision from now on, before the model is sharded and compiled.

    Returns what undoes it.
    """
    undo: list[Callable[[], None]] = []
    for router in routers.readable:
        key, copied = max(_hooked.keys(), default=0) + 1, hasattr(router.module, _KEY)
        _hooked[key] = router
        # All routers share one hook, and are distinguished by a tensor: a compiled block serves every layer.
        undo.append(replace_attribute(router.module, _KEY, torch.tensor(key, device="cpu")))
        undo.append(replace_attribute(router.module, _POSITIONS, router.positions))
        if not copied:  # a copy of a hooked model came with the hook
            undo.append(router.module.register_forward_hook(_hook).remove)
    return undo


@contextmanager
def hooked_routers(model: nn.Module) -> Iterator[Routers]:
    """Return the routers of an unwrapped model, hooked inside the context; those that set-up hooked stay so."""
    controller = ModelAdapter.of(model).routers
    found = find_routers(model) if controller is None else controller.found
    known = [_hooked.get(int(getattr(router.module, _KEY, 0))) for router in found.readable]
    hooked = tuple(
        each for each, router in zip(known, found.readable, strict=True) if each and each.module is router.module
    )
    if len(hooked) == len(found.readable):
        yield replace(found, readable=hooked)
        return
    undo = hook_routers(found)
    try:
        yield found
    finally:
        for each in reversed(undo):
            each()


def _hook(module: nn.Module, args: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
    logits_at, weights_at, indices_at = getattr(module, _POSITIONS)
    changed = list(output)
    changed[weights_at], changed[indices_at], _ = _route(
        output[logits_at].flatten(0, -2), output[weights_at], output[indices_at], getattr(module, _KEY),
        torch.is_grad_enabled(),
    )  # fmt: skip
    return tuple(changed)


@torch.library.custom_op("veomni::route", mutates_args=())
def _route(
    logits: Tensor, weights: Tensor, indices: Tensor, key: Tensor, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights and experts as the hooks leave them, and whether the choice is another than the router's."""
    router = _hooked[int(key)]
    decision, chosen = RoutingDecision(logits, weights, indices), torch.tensor(False, device="cpu")
    for hook in router.hooks:
        other = hook.choose(router, decision)
        if other is not None:
            assert router.scoring is not None
            own = router.scoring.weights(wide(logits), other).to(weights.dtype)
            decision, chosen = replace(decision, weights=own, indices=other), torch.tensor(True, device="cpu")
    for hook in router.hooks:
        hook.observe(router, decision, training)
    return decision.weights.clone(), decision.indices.clone(), chosen


@_route.register_fake
def _(logits: Tensor, weights: Tensor, indices: Tensor, key: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(weights), torch.empty_like(indices), torch.empty((), dtype=torch.bool, device="cpu")


@torch.library.custom_op("veomni::route_backward", mutates_args=())
def _route_backward(
    grad_weights: Tensor, logits: Tensor, indices: Tensor, key: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of logits and of the router's own weights."""
    router, values = _hooked[int(key)], wide(logits)
    gradient = torch.zeros_like(values)
    for hook in router.hooks:
        more = hook.gradient(router, values)
        if more is not None:
            gradient += more
    if not bool(chosen):
        return gradient.to(logits.dtype), grad_weights.clone()
    assert router.scoring is not None
    gradient += router.scoring.logit_gradient(values, indices, wide(grad_weights))
    return gradient.to(logits.dtype), torch.zeros_like(grad_weights)


@_route_backward.register_fake
def _(grad_weights: Tensor, logits: Tensor, indices: Tensor, key: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(logits), torch.empty_like(grad_weights)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, _, key, _ = inputs
    _, indices, chosen = output
    ctx.save_for_backward(logits, indices, key, chosen)


def _backward(ctx: Any, grad_weights: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    logits, indices, key, chosen = ctx.saved_tensors
    grad_logits, grad_own = _route_backward(grad_weights, logits, indices, key, chosen)
    return grad_logits, grad_own, None, None, None


_route.register_autograd(_backward, setup_context=_save)
