"""The two halves of an expert, each an operation that saves neither sorted rows nor activations for its gradients.

Two operations, so that selective activation checkpointing can keep the first product, which the backward of both reads,
and recompute the second. Routing weights are applied between the products: the same sum as after them, over fewer
channels.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veomni.ops.experts.activation import SwiGLU, activate, activate_backward
from veomni.ops.experts.backends import grouped_matmul, grouped_outer
from veomni.ops.experts.permute import Routing, rows_of_tokens, sum_of_rows, zero_tail_


def expert_up(hidden: Tensor, weights: Tensor, rows: Routing, backend: str) -> Tensor:
    """Return every row's product with its expert's matrix, ``[rows, out]``; zeros for rows past the last expert's.

    ``hidden`` are tokens, ``[tokens, in]``; ``weights`` are ``[experts, in, out]``, every matrix or its transpose
    contiguous.
    """
    product: Tensor = _up(hidden, weights, list(rows[:3]), rows.top_k, backend)
    return product


def expert_linear(rows: Tensor, weights: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """Return each row's product with its expert's matrix, ``[rows, out]``, of rows that are sorted by expert already.

    ``offsets`` are where each expert's rows end. An operation of its own: selective activation checkpointing keeps the
    results of :func:`expert_up` only.
    """
    product: Tensor = _linear(rows, weights, [offsets], 1, backend)
    return product


def add_bias(rows: Tensor, bias: Tensor | None, offsets: Tensor, backend: str) -> Tensor:
    """Add its expert's bias of ``[experts, out]`` to every row; rows past the last expert's stay as they are."""
    if bias is None:
        return rows
    # A product with ones: its gradient is summed in float32, and in one pass. Eight columns: kernels need 16 bytes.
    ones = rows.new_ones(rows.shape[0], 8)
    return rows + expert_linear(ones, F.pad(bias[:, None], (0, 0, 0, 7)), offsets, backend)


def expert_down(
    gate_up: Tensor, bias: Tensor | None, top_k_weights: Tensor, weights: Tensor, form: SwiGLU, rows: Routing,
    backend: str,
) -> Tensor:  # fmt: skip
    """Return the second product of the activated first one, summed by token, ``[tokens, hidden]``.

    ``gate_up`` is what :func:`expert_up` returned, ``[rows, 2 * intermediate]``, and ``bias`` its ``[experts, 2 *
    intermediate]``; ``top_k_weights`` are ``[tokens, k]``; ``weights`` are ``[experts, intermediate, hidden]``.
    """
    result: Tensor = _down(
        gate_up, bias, top_k_weights.contiguous(), weights, list(rows[:3]), rows.top_k, backend, list(form)
    )
    return result


# ``rows`` is [offsets, order, inverse], or [offsets] where rows are sorted already. An operation cannot return None: a
# gradient that is not needed is an empty tensor.


def _product(hidden: Tensor, weights: Tensor, rows: list[Tensor], top_k: int, backend: str) -> Tensor:
    return zero_tail_(grouped_matmul(_rows(hidden, rows, top_k), weights, rows[0], backend), rows[0])


@torch.library.custom_op("veomni::expert_product_backward", mutates_args=())
def _product_backward(
    grad: Tensor, hidden: Tensor, weights: Tensor, rows: list[Tensor], top_k: int, backend: str, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    offsets, (needs_hidden, needs_weights) = rows[0], needs
    to_hidden = to_weights = None
    if needs_weights:
        to_weights = _to_weights(_rows(hidden, rows, top_k), grad, weights, offsets, backend)
    if needs_hidden:
        to_hidden = _tokens(grouped_matmul(grad, weights.transpose(1, 2), offsets, backend), rows, top_k)
    return _filled(grad, to_hidden, to_weights)


@torch.library.custom_op("veomni::expert_down", mutates_args=())
def _down(
    gate_up: Tensor, bias: Tensor | None, top_k_weights: Tensor, weights: Tensor, rows: list[Tensor], top_k: int,
    backend: str, form: list[float],
) -> Tensor:  # fmt: skip
    hidden = activate(gate_up, bias, top_k_weights, _routing(rows, top_k), _form(form))
    return _tokens(grouped_matmul(hidden, weights, rows[0], backend), rows, top_k)


@torch.library.custom_op("veomni::expert_down_backward", mutates_args=())
def _down_backward(
    grad: Tensor, gate_up: Tensor, bias: Tensor | None, top_k_weights: Tensor, weights: Tensor,
    rows: list[Tensor], top_k: int, backend: str, form: list[float], needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    routing, (needs_gate_up, needs_bias, needs_scale, needs_weights) = _routing(rows, top_k), needs
    by_row = _rows(grad, rows, top_k)
    to_hidden = grouped_matmul(by_row, weights.transpose(1, 2), routing.offsets, backend)
    to_gate_up, hidden, to_scale = activate_backward(to_hidden, gate_up, bias, top_k_weights, routing, _form(form))
    del to_hidden
    to_bias = to_weights = None
    if needs_weights:
        to_weights = _to_weights(hidden, by_row, weights, routing.offsets, backend)
    if needs_bias:
        ones = to_gate_up.new_ones(to_gate_up.shape[0], 8)
        to_bias = grouped_outer(ones, to_gate_up, routing.offsets, backend)[:, 0].contiguous()
    return _filled(grad, to_gate_up if needs_gate_up else None, to_bias, to_scale if needs_scale else None, to_weights)


def _filled(like: Tensor, *gradients: Tensor | None) -> Any:
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _routing(rows: list[Tensor], top_k: int) -> Routing:
    offsets, order, inverse = rows
    return Routing(offsets, order, inverse, top_k)


def _form(numbers: list[float]) -> SwiGLU:
    alpha, limit, shift, interleaved = numbers
    return SwiGLU(alpha, limit, shift, bool(interleaved))


def _rows(hidden: Tensor, rows: list[Tensor], top_k: int) -> Tensor:
    return hidden if len(rows) == 1 else rows_of_tokens(hidden, rows[1], rows[2], top_k)


def _tokens(results: Tensor, rows: list[Tensor], top_k: int) -> Tensor:
    if len(rows) == 1:
        return zero_tail_(results, rows[0])
    return sum_of_rows(results, rows[2], top_k, offsets=rows[0])


def _to_weights(rows: Tensor, grad: Tensor, weights: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """Return the gradient of ``weights``, in their memory order."""
    if weights.stride(1) == 1 and weights.shape[1] > 1:  # the parameter is [experts, out, in]
        return grouped_outer(grad, rows, offsets, backend).transpose(1, 2)
    return grouped_outer(rows, grad, offsets, backend)


# ---------------------------------------------------------------- shapes and gradients


def _empty_gradients(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    needed = zip(inputs, inputs[-1], strict=False)
    return tuple(torch.empty_like(each) if need else grad.new_empty(0) for each, need in needed)


def _differentiate(operation: Any, backward: Callable[..., tuple[Tensor, ...]], count: int) -> None:
    """Let ``backward`` compute the gradients of the first ``count`` arguments; the next one is the list of rows."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:count], *inputs[count])
        ctx.others = inputs[count + 1 :]

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved, needs = ctx.saved_tensors, list(ctx.needs_input_grad[:count])
        rows = list(saved[count:])
        gradients = backward(grad.contiguous(), *saved[:count], rows, *ctx.others, needs)
        kept = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
        return *kept, [None] * len(rows), *[None] * len(ctx.others)

    operation.register_autograd(differentiate, setup_context=save)


def _shape_of_product(hidden: Tensor, weights: Tensor, rows: list[Tensor], top_k: int, backend: str) -> Tensor:
    return hidden.new_empty(hidden.shape[0] if len(rows) == 1 else rows[1].shape[0], weights.shape[2])


_up, _linear = (
    torch.library.custom_op(f"veomni::{name}", _product, mutates_args=()) for name in ("expert_up", "expert_linear")
)
for _operation in (_up, _linear):
    _operation.register_fake(_shape_of_product)
    _differentiate(_operation, _product_backward, 2)
_differentiate(_down, _down_backward, 4)
_product_backward.register_fake(_empty_gradients)
_down_backward.register_fake(_empty_gradients)


@_down.register_fake
def _(gate_up: Tensor, bias: Any, top_k_weights: Tensor, weights: Tensor, *others: Any) -> Tensor:
    return gate_up.new_empty(top_k_weights.shape[0], weights.shape[2])
