"""The two halves of gated experts, with as few saved tensors as their gradients allow.

``expert_up`` keeps its input and not the sorted copy of it; ``expert_down`` keeps what the first product gave and not
the activation, which is computed again in the backward. Two halves and not one, so that a recomputed block computes the
first only. Routing weights act between the products: the same sum as behind them, over fewer channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veomni.ops.experts.activation import SwiGLU, swiglu, swiglu_backward
from veomni.ops.experts.matmul import expert_of_row, grouped_matmul, sum_by_expert, weights_gradient
from veomni.ops.experts.permute import past_end, rows_of_tokens, sum_of_rows, zero_tail_
from veomni.ops.experts.routing import Routing


@dataclass(frozen=True)
class Rows:
    """Which rows the experts run on.

    Attributes:
        offsets: Where each expert's rows end, int32 ``[experts]``.
        routing: The pairs that the rows belong to; None where the rows are given as they are.
        top_k: Pairs per token.
    """

    offsets: Tensor
    routing: Routing | None = None
    top_k: int = 1

    @property
    def order(self) -> Tensor | None:
        """Places of the sorted pairs, or None."""
        return None if self.routing is None else self.routing.order

    @property
    def inverse(self) -> Tensor | None:
        """Where each pair is once sorted, or None."""
        return None if self.routing is None else self.routing.inverse


def expert_up(hidden: Tensor, weights: Tensor, rows: Rows, backend: str) -> Tensor:
    """Return the first product, ``[rows, 2 * intermediate]``.

    Args:
        hidden: Tokens ``[tokens, hidden]`` where ``rows`` has a routing, else the rows themselves.
        weights: ``[experts, hidden, 2 * intermediate]``.
        rows: Which rows.
        backend: The matmul backend.
    """
    product: Tensor = _Up.apply(hidden, weights, rows.offsets, rows.order, rows.inverse, rows.top_k, backend)
    return product


def expert_down(
    gate_up: Tensor, bias: Tensor | None, top_k_weights: Tensor | None, weights: Tensor, form: SwiGLU, rows: Rows,
    backend: str,
) -> Tensor:  # fmt: skip
    """Return the second product of the activated first one; summed by token where ``rows`` has a routing.

    Args:
        gate_up: What :func:`expert_up` returned.
        bias: The first product's bias, ``[experts, 2 * intermediate]``, or None.
        top_k_weights: ``[tokens, k]``, or None for ones.
        weights: ``[experts, intermediate, hidden]``.
        form: Which activation.
        rows: Which rows.
        backend: The matmul backend.
    """
    result: Tensor = _Down.apply(
        gate_up, bias, top_k_weights, weights, rows.offsets, rows.order, rows.inverse, rows.top_k,
        form.alpha, form.limit, form.shift, form.interleaved, backend,
    )  # fmt: skip
    return result


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weights: Tensor, offsets: Tensor, order: Tensor | None, inverse: Tensor | None,
        top_k: int, backend: str,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(hidden, weights, offsets, order, inverse)
        ctx.top_k, ctx.backend = top_k, backend
        return grouped_matmul(_rows(hidden, order, inverse, top_k), weights, offsets, backend)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weights, offsets, order, inverse = ctx.saved_tensors
        needs_hidden, needs_weights, *_ = ctx.needs_input_grad
        to_hidden = to_weights = None
        if needs_weights:
            rows = _rows(hidden, order, inverse, ctx.top_k, again=True)
            to_weights = weights_gradient(rows, grads[0], weights, offsets, ctx.backend)
            del rows
        if needs_hidden:
            to_hidden = grouped_matmul(grads[0], weights.transpose(1, 2), offsets, ctx.backend)
            to_hidden = _tokens(to_hidden, offsets, inverse, ctx.top_k)
        return to_hidden, to_weights, None, None, None, None, None


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate_up: Tensor, bias: Tensor | None, top_k_weights: Tensor | None, weights: Tensor, offsets: Tensor,
        order: Tensor | None, inverse: Tensor | None, top_k: int, alpha: float, limit: float, shift: float,
        interleaved: bool, backend: str,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(gate_up, bias, top_k_weights, weights, offsets, order, inverse)
        ctx.form, ctx.top_k, ctx.backend = (alpha, limit, shift, interleaved), top_k, backend
        hidden = _activate(gate_up, bias, top_k_weights, offsets, order, ctx.form, backend)
        return _tokens(grouped_matmul(hidden, weights, offsets, backend), offsets, inverse, top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, bias, top_k_weights, weights, offsets, order, inverse = ctx.saved_tensors
        _, needs_bias, _, needs_weights, *_ = ctx.needs_input_grad
        grad = _rows(grads[0].contiguous(), order, inverse, ctx.top_k)
        to_hidden = grouped_matmul(grad, weights.transpose(1, 2), offsets, ctx.backend)
        to_gate_up, hidden, to_top_k_weights = _activate_backward(
            gate_up, to_hidden, bias, top_k_weights, offsets, order, inverse, ctx.form, ctx.backend
        )
        del to_hidden
        to_weights = weights_gradient(hidden, grad, weights, offsets, ctx.backend) if needs_weights else None
        to_bias = sum_by_expert(to_gate_up, offsets, ctx.backend) if needs_bias else None
        return to_gate_up, to_bias, to_top_k_weights, to_weights, *[None] * 9


def _rows(hidden: Tensor, order: Tensor | None, inverse: Tensor | None, top_k: int, *, again: bool = False) -> Tensor:
    if order is None or inverse is None:
        return hidden
    return rows_of_tokens(hidden, order, inverse, top_k, again=again)


def _tokens(rows: Tensor, offsets: Tensor, inverse: Tensor | None, top_k: int) -> Tensor:
    return zero_tail_(rows, offsets) if inverse is None else sum_of_rows(rows, inverse, top_k, offsets=offsets)


def _activate(
    gate_up: Tensor, bias: Tensor | None, top_k_weights: Tensor | None, offsets: Tensor, order: Tensor | None,
    form: tuple[float, float, float, bool], backend: str,
) -> Tensor:  # fmt: skip
    if backend == "triton":
        from veomni.ops.experts import activation_triton

        experts = None if bias is None else expert_of_row(gate_up, offsets)
        return activation_triton.swiglu(gate_up, bias, experts, top_k_weights, order, *form)
    return swiglu(_biased(gate_up, bias, offsets), SwiGLU(*form), _scale(top_k_weights, order))


def _activate_backward(
    gate_up: Tensor, grad: Tensor, bias: Tensor | None, top_k_weights: Tensor | None, offsets: Tensor,
    order: Tensor | None, inverse: Tensor | None, form: tuple[float, float, float, bool], backend: str,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return the gradient of ``gate_up``, the activation once more, and the gradient of ``top_k_weights``."""
    if backend == "triton":
        from veomni.ops.experts import activation_triton

        experts = None if bias is None else expert_of_row(gate_up, offsets)
        to_gate_up, hidden, to_weights = activation_triton.swiglu_backward(
            gate_up, grad, bias, experts, top_k_weights, order, offsets, *form
        )
        return to_gate_up, hidden, None if top_k_weights is None else to_weights
    to_gate_up, hidden, to_scale = swiglu_backward(
        _biased(gate_up, bias, offsets), grad, SwiGLU(*form), _scale(top_k_weights, order)
    )
    if to_scale is None or top_k_weights is None or inverse is None:
        return to_gate_up, hidden, None
    to_scale = to_scale.masked_fill(past_end(to_scale, offsets)[:, 0], 0)
    return to_gate_up, hidden, to_scale.index_select(0, inverse).view_as(top_k_weights)


def _biased(gate_up: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    return gate_up if bias is None else gate_up + bias.index_select(0, expert_of_row(gate_up, offsets))


def _scale(top_k_weights: Tensor | None, order: Tensor | None) -> Tensor | None:
    return None if top_k_weights is None or order is None else top_k_weights.flatten().index_select(0, order)
