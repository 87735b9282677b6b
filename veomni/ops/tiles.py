"""Modules that compute each token independently, run over tiles of tokens: intermediates exist for one tile at a time.

After TiledMLP of Arctic Long Sequence Training (arXiv:2506.13996). Input and weights are saved for the backward, which
recomputes each tile. Gradients of weights are accumulated over tiles in float32 or better and rounded once, so each
backward makes one gradient per weight. It is a custom operator: compiled graphs contain it as one opaque node.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from veomni.parallel.wrappers import wide_dtype

_STRUCTURES: dict[str, nn.Module] = {}


def register_structure(skeleton: nn.Module) -> str:
    """Store a module on the meta device for :func:`run_in_tiles`; return its key, the same for equal structures."""
    own = [vars(each).items() for each in skeleton.modules()]
    plain = [(name, value) for each in own for name, value in each if not name.startswith("_")]
    text = f"{type(skeleton)} {skeleton!r} {plain}"
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    _STRUCTURES.setdefault(key, skeleton)
    return key


def run_in_tiles(rows: Tensor, weights: Sequence[Tensor], structure: str, tokens: int) -> Tensor:
    """Return a module's output for rows ``[rows, width]``, of the same shape, computed ``tokens`` rows at a time.

    ``structure`` is the key of the module, and ``weights`` are all of its parameters, in the order of
    ``named_parameters``. Under autocast it computes in the dtype of autocast.
    """
    if torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weights = rows.to(dtype), [weight.to(dtype) for weight in weights]
    trained = [weight.requires_grad for weight in weights]
    result: Tensor = _forward(rows, list(weights), trained, structure, tokens)
    return result


@torch.library.custom_op("veomni::tiles", mutates_args=())
def _forward(rows: Tensor, weights: list[Tensor], trained: list[bool], structure: str, tokens: int) -> Tensor:
    call, result = _call(structure, weights, trained), torch.empty_like(rows)
    given = [weight for weight, one in zip(weights, trained, strict=True) if one]
    for tile, part in zip(rows.split(tokens), result.split(tokens), strict=True):
        part.copy_(call(tile, *given))
    return result


@_forward.register_fake
def _forward_shape(rows: Tensor, weights: list[Tensor], trained: list[bool], structure: str, tokens: int) -> Tensor:
    return torch.empty_like(rows)


@torch.library.custom_op("veomni::tiles_backward", mutates_args=())
def _gradients(
    grad: Tensor, rows: Tensor, weights: list[Tensor], trained: list[bool], structure: str, tokens: int
) -> list[Tensor]:
    call, to_rows = _call(structure, weights, trained), torch.empty_like(rows)
    given = [weight for weight, one in zip(weights, trained, strict=True) if one]
    sums = [torch.zeros_like(weight, dtype=wide_dtype(weight.dtype)) for weight in given]
    for tile, part, back in zip(rows.split(tokens), grad.split(tokens), to_rows.split(tokens), strict=True):
        to_tile, *to_weights = vjp(call, tile, *given)[1](part)
        back.copy_(to_tile)
        for total, one in zip(sums, to_weights, strict=True):
            total += one
    return [to_rows, *(total.to(weight.dtype) for total, weight in zip(sums, given, strict=True))]


@_gradients.register_fake
def _gradient_shapes(
    grad: Tensor, rows: Tensor, weights: list[Tensor], trained: list[bool], structure: str, tokens: int
) -> list[Tensor]:
    return [torch.empty_like(rows), *(torch.empty_like(w) for w, one in zip(weights, trained, strict=True) if one)]


def _call(structure: str, weights: list[Tensor], trained: list[bool]) -> Callable[..., Tensor]:
    """Return the module as a function of a tile and its trained weights."""
    skeleton = _STRUCTURES[structure]
    names = [name for name, _ in skeleton.named_parameters()]
    frozen = {name: weight for name, weight, one in zip(names, weights, trained, strict=True) if not one}
    trainable = [name for name, one in zip(names, trained, strict=True) if one]

    def call(tile: Tensor, *given: Tensor) -> Tensor:
        result: Tensor = functional_call(skeleton, {**frozen, **dict(zip(trainable, given, strict=True))}, (tile,))
        return result

    return call


def _set_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, ctx.trained, ctx.structure, ctx.tokens = inputs
    ctx.save_for_backward(rows, *weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, *weights = ctx.saved_tensors
    to_rows, *found = _gradients(grad.contiguous(), rows, weights, ctx.trained, ctx.structure, ctx.tokens)
    to_weights = [found.pop(0) if one else None for one in ctx.trained]
    return to_rows, to_weights, None, None, None


_forward.register_autograd(_backward, setup_context=_set_context)
