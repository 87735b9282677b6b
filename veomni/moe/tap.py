"""Where others come between a router and its experts: one operation, opaque to ``torch.compile``.

Who listens, and what they count or replay, changes from step to step; a compiled block must not break its graph or be
compiled anew for it. So the router's output passes through a custom operation, which asks the listeners when it runs.
Its backward gives the logits, which nothing uses after the choice was made, the gradients of losses on them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from veomni.moe.routers import Router, Routers, Routing, find_routers
from veomni.moe.scoring import wide

_KEY = "_veomni_router_key"
_POSITIONS = "_veomni_router_positions"
_tapped: WeakValueDictionary[int, Router] = WeakValueDictionary()


def _tap(router: Router) -> None:
    key = len(_tapped) + 1
    while key in _tapped:
        key += 1
    _tapped[key] = router
    # All routers share one hook, and tell themselves apart by a tensor: a compiled block serves every layer.
    copied = hasattr(router.module, _KEY)  # a copy of a model came with the hook
    setattr(router.module, _KEY, torch.tensor(key, device="cpu"))
    setattr(router.module, _POSITIONS, router.positions)
    if not copied:
        router.module.register_forward_hook(_hook)


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
    """Return weights and experts as the listeners leave them, and whether the choice is another than the router's.

    Args:
        logits: ``[tokens, experts]``.
        weights: ``[tokens, top_k]``.
        indices: int64 ``[tokens, top_k]``.
        key: Whose decision it is; int64, on the CPU.
        training: Whether gradients will be asked for.
    """
    router = _tapped[int(key)]
    routing, chosen = Routing(logits, weights, indices), torch.tensor(False, device="cpu")
    for listener in router.listeners:
        other = listener.choose(router, routing)
        if other is not None:
            assert router.scoring is not None
            own = router.scoring.weights(wide(logits), other).to(weights.dtype)
            routing, chosen = replace(routing, weights=own, indices=other), torch.tensor(True, device="cpu")
    for listener in router.listeners:
        listener.see(router, routing, training)
    return routing.weights.clone(), routing.indices.clone(), chosen


@_route.register_fake
def _(logits: Tensor, weights: Tensor, indices: Tensor, key: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(weights), torch.empty_like(indices), torch.empty((), dtype=torch.bool, device="cpu")


@torch.library.custom_op("veomni::route_backward", mutates_args=())
def _route_backward(
    grad_weights: Tensor, logits: Tensor, indices: Tensor, key: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of logits and of the router's own weights."""
    router, values = _tapped[int(key)], wide(logits)
    gradient = torch.zeros_like(values)
    for listener in router.listeners:
        more = listener.gradient(router, values)
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


_watched: WeakKeyDictionary[nn.Module, Routers] = WeakKeyDictionary()


def watch_routers(model: nn.Module) -> Routers:
    """Return the routers of a model, whose listeners from now on see every decision.

    The first call for a model must come before it is sharded and compiled; the same routers are returned ever after.
    """
    if model not in _watched:
        _watched[model] = find_routers(model)
        for router in _watched[model].readable:
            _tap(router)
    return _watched[model]
