"""The forward of a layer's experts, on one rank or on the ranks that share them."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veomni.models.transformers_api.experts import apply_gate
from veomni.ops.experts.exchange import EXCHANGE, exchange_experts
from veomni.ops.experts.fused import add_bias, expert_down, expert_linear, expert_up
from veomni.ops.experts.layout import activation_of, local_weights, products
from veomni.ops.experts.permute import Routing, combine_rows, route
from veomni.parallel.wrappers import local_shard


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, backend: str
) -> Tensor:
    """Return each token's weighted sum over the experts of a transformers module, on this rank or on several.

    Tokens and result are ``[tokens, hidden]``; the expert indices, int64, and their weights are ``[tokens, k]``.
    """
    experts, run = len(local_shard(module.down_proj)), partial(run_local_experts, module, backend=backend)  # type: ignore[arg-type]
    if hasattr(module, EXCHANGE):
        return exchange_experts(hidden_states, top_k_index, top_k_weights, experts, run, getattr(module, EXCHANGE))
    return run(hidden_states, route(top_k_index, experts), top_k_index, top_k_weights)


def run_local_experts(
    module: nn.Module, hidden: Tensor, rows: Routing, top_k_index: Tensor, top_k_weights: Tensor, backend: str
) -> Tensor:
    """Return each token's weighted sum over the experts that this rank holds, ``[tokens, hidden]``.

    ``rows`` is the routing of ``top_k_index``; both count the experts of this rank from 0, and their number stands for
    no expert. An expert without a row gets zero gradients, also where there is no row at all.
    """
    dtype, offsets, activation = _compute_dtype(module, hidden), rows.offsets, activation_of(module)
    (up, up_bias), (down, down_bias) = (local_weights(module, name, dtype) for name in products(module))
    has_norm = getattr(module, "has_post_expert_norm", False)  # since transformers 5.19
    result = expert_up(hidden.to(dtype), up, rows, backend)
    if activation is not None and not has_norm:
        result = expert_down(result, up_bias, top_k_weights, down, activation, rows, backend)
        if down_bias is not None:
            result = result + _weighted_bias(down_bias, top_k_index, top_k_weights)
        return result.to(hidden.dtype)
    experts: Any = module
    result = add_bias(result, up_bias, offsets, backend)
    result = apply_gate(module, result) if experts.has_gate else experts.act_fn(result)
    result = add_bias(expert_linear(result.to(dtype), down, offsets, backend), down_bias, offsets, backend)
    if has_norm:
        result = experts.post_expert_norm(result)
    return combine_rows(result, rows, top_k_weights).to(hidden.dtype)


def _weighted_bias(bias: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return for each token the weighted sum of its experts' biases, ``[tokens, hidden]``, as one dense product."""
    shares = bias.new_zeros(top_k_index.shape[0], bias.shape[0] + 1)
    shares = shares.scatter(1, top_k_index, top_k_weights.to(bias.dtype))
    return torch.mm(shares[:, :-1], bias)


def _compute_dtype(module: nn.Module, rows: Tensor) -> torch.dtype:
    """Return the dtype of the products: that of autocast where it is enabled, else that of the weights."""
    if torch.is_autocast_enabled(rows.device.type):
        return torch.get_autocast_dtype(rows.device.type)
    weights: Tensor = module.down_proj  # type: ignore[assignment]
    return weights.dtype
