"""Which attention and which experts a model computes with, where the choice was left to the library."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from veomni.errors import ModelError
from veomni.families.record import family_record
from veomni.logging import create_logger
from veomni.models.adapter.adapter import ModelAdapter
from veomni.models.transformers_api.attention import attention_of, set_attention
from veomni.models.transformers_api.capabilities import caps_scores, supports_flash_attention
from veomni.models.transformers_api.experts import has_experts, register_experts
from veomni.ops.attention.flash_package import replace_flash_kernels
from veomni.ops.attention.varlen import VARLEN, kernels_in_use, register_attention
from veomni.ops.experts.backends import choose_backend
from veomni.ops.experts.forward import experts_forward
from veomni.ops.experts.layout import ACTIVATION, find_activation, holds_experts

logger = create_logger(__name__)


def resolve_attention(model: nn.Module, device: torch.device, *, varlen: bool, packages: Sequence[str] = ()) -> None:
    """Give a model whose attention was left open the fastest one that is exact for packed rows.

    ``varlen`` says whether the device runs variable-length attention in the precision of the run, ``packages`` which
    flash-attention packages it can run, by PyTorch's names.
    """
    if ModelAdapter.of(model).attention_open and varlen:
        if reason := _why_not_varlen(model):
            logger.warning_rank0("attention varlen is not used: %s; %s builds a mask", reason, attention_of(model))
        else:
            register_attention()
            model.set_attn_implementation(VARLEN)  # type: ignore[operator]
            replace_flash_kernels(packages, device)
            logger.info_rank0("attention: varlen (%s)", kernels_in_use())
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if family_record(config).padded_audio and attention_of(module) == VARLEN:
            set_attention(config, "sdpa")  # encoders of padded audio need the mask


def _why_not_varlen(model: Any) -> str | None:
    config = model.config.get_text_config()
    if not supports_flash_attention(model):
        return "the model does not support flash attention"
    if caps_scores(config):
        return "the model caps its attention scores"
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return "the model has attention sinks"
    if getattr(config, "attention_dropout", 0.0):
        return "the model has attention dropout"
    if getattr(config, "v_head_dim", None) not in (None, getattr(config, "head_dim", None)):
        return "heads of values and keys differ in size"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return None if head_dim <= 256 and head_dim % 8 == 0 else f"heads have {head_dim} channels"


def resolve_experts(model: nn.Module, compute: torch.dtype, available: Sequence[str]) -> None:
    """Run mixture-of-experts layers with the fastest of the device's backends that computes in ``compute``.

    A ModelError where the requested backend cannot run the model here. Models without experts are left alone.
    """
    adapter = ModelAdapter.of(model)
    if not has_experts(model):
        if adapter.experts != "auto":
            problem = f"experts {adapter.experts} was chosen, and {type(model).__name__} has no experts"
            raise ModelError(problem, "set experts to auto", "build_model.experts")
        return
    modules = [module for module in model.modules() if holds_experts(module)]
    for module in modules:  # now: it cannot be tried out in a compiled forward
        adapter.patch(module, ACTIVATION, find_activation(module))
    backend = choose_backend(modules, adapter.experts, available, compute)
    name = f"veomni_{backend}"
    register_experts(name, partial(experts_forward, backend=backend))
    model.set_experts_implementation(name)  # type: ignore[operator]
    logger.info_rank0("experts: %s", backend)
