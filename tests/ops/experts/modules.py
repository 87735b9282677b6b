"""Small experts modules of transformers, one for every combination of flags and every kind of activation it has."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

HIDDEN, INTERMEDIATE, EXPERTS = 16, 24, 5

ARCHITECTURES = [
    "qwen3_moe",  # SwiGLU
    "mixtral",
    "deepseek_v3",
    "lfm2_moe",  # the activation is a function
    "gpt_oss",  # transposed, biased, interleaved, clamped
    "openai_privacy_filter",  # transposed, biased, clamped
    "aria",  # transposed
    "deepseek_v4",  # clamped without a shift
    "minimax_m3_vl",  # clamped with a shift, not interleaved
    "beam",  # a gating of its own that is SwiGLU
    "gemma4",  # another activation
    "inkling2",  # a gating of its own
    "nemotron_h",  # no gate
    "muse_spark",  # a norm behind each expert
]

_CONFIG = {
    "hidden_size": HIDDEN, "moe_hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
    "moe_intermediate_size": INTERMEDIATE, "num_experts": EXPERTS, "n_routed_experts": EXPERTS,
    "num_local_experts": EXPERTS, "moe_num_experts": EXPERTS, "hidden_act": "silu",
    "hidden_activation": "gelu_pytorch_tanh", "mlp_hidden_act": "relu2", "moe_latent_size": None, "post_norm_eps": 1e-6,
    "swiglu_alpha": 1.702, "swiglu_limit": 2.5, "mlp_gate_softcap": 3.0, "mlp_up_softcap": 2.0,
    "_experts_implementation": "eager",
}  # fmt: skip


def experts(name: str, dtype: torch.dtype = torch.float64, scale: float = 0.3, **changes) -> nn.Module:
    """Return the experts module of an architecture, with random values and transformers' own loop as its forward."""
    try:
        modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    except ModuleNotFoundError:
        pytest.skip(f"this transformers has no {name}")
    classes = [value for value in vars(modeling).values() if hasattr(value, "_apply_gate")]
    if not classes:
        pytest.skip(f"this transformers does not run {name} through its experts interface")
    module = classes[0](SimpleNamespace(**{**_CONFIG, **changes})).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(values * (1.0 if parameter.ndim < 3 else scale))
    return module
