"""The experts of a layer, from tokens to tokens."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from veomni.ops.experts.exchange import EXCHANGE, exchange_experts
from veomni.ops.experts.fused import Rows, expert_down, expert_up
from veomni.ops.experts.layout import expert_layout
from veomni.ops.experts.permute import combine_rows, permute_tokens
from veomni.ops.experts.routing import route
from veomni.ops.experts.rows import bias, called_rows, compute_dtype, expert_rows, weight


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, backend: str
) -> Tensor:
    """Return each token's weighted sum over its experts, ``[tokens, hidden]``, on this rank or on several.

    Args:
        module: A transformers experts module.
        hidden_states: ``[tokens, hidden]``.
        top_k_index: int64 ``[tokens, k]``.
        top_k_weights: ``[tokens, k]``.
        backend: "loop", "grouped_mm", "triton" or "npu".
    """
    exchange = getattr(module, EXCHANGE, None)
    if exchange is not None:
        run, num_experts = partial(expert_rows, module, backend=backend), int(module.num_experts)  # type: ignore[arg-type]
        return exchange_experts(hidden_states, top_k_index, top_k_weights, num_experts, run, exchange)
    layout, dtype = expert_layout(module), compute_dtype(module, hidden_states)
    routing, top_k = route(top_k_index, layout.local_experts), top_k_index.shape[1]
    tokens = hidden_states.to(dtype)
    if layout.activation is None or layout.has_post_expert_norm:
        rows = permute_tokens(tokens, routing, top_k)
        rows = called_rows(module, layout, rows, routing.offsets, backend)
        return combine_rows(rows, routing, top_k_weights).to(hidden_states.dtype)
    rows_of = Rows(routing.offsets, routing, top_k)
    gate_up = expert_up(tokens, weight(module, layout, layout.first, dtype), rows_of, backend)
    result = expert_down(
        gate_up, bias(module, layout, layout.first, dtype), top_k_weights, weight(module, layout, "down_proj", dtype),
        layout.activation, rows_of, backend,
    )  # fmt: skip
    down_bias = bias(module, layout, "down_proj", dtype)
    if down_bias is not None:
        result = result + _weighted_bias(down_bias, top_k_index, top_k_weights)
    return result.to(hidden_states.dtype)


def _weighted_bias(down_bias: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return of every token the weighted sum of its experts' biases, as one dense product."""
    shares = down_bias.new_zeros(top_k_index.shape[0], down_bias.shape[0] + 1)
    shares = shares.scatter(1, top_k_index, top_k_weights.to(down_bias.dtype))
    return torch.mm(shares[:, :-1], down_bias)
