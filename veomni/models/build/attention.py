"""Which attention a model runs with, where the choice was left to the library."""

from __future__ import annotations

from typing import Any

from torch import nn

from veomni.families.record import family_record
from veomni.logging import create_logger
from veomni.models.adapter.adapter import ModelAdapter
from veomni.models.transformers_api.attention import attention_of, set_attention
from veomni.models.transformers_api.capabilities import supports_flash_attention
from veomni.ops.attention.backends import AttentionBackend
from veomni.ops.attention.varlen import VARLEN, register_attention

logger = create_logger(__name__)

def attention_name(choice: str | AttentionBackend) -> str:
    """Return transformers' name of an attention; a backend with a function of its own is registered under its name."""
    if isinstance(choice, str):
        return choice
    if choice.function is not None:
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(choice.name, choice.function)
        AttentionMaskInterface.register(choice.name, AttentionMaskInterface()[choice.mask])
    return choice.name


def resolve_attention(model: nn.Module, *, varlen: bool) -> None:
    """Give a model whose attention was left open the fastest one that is exact for packed rows.

    Args:
        model: A model from ``build_model``; other modules are left alone.
        varlen: Whether the device runs variable-length attention in the precision of the run.
    """
    if not ModelAdapter.of(model).attention_open or not varlen:
        _let_padded_encoders_mask(model)
        return
    reason = _why_not_varlen(model)
    if reason:
        logger.warning_rank0("attention varlen is not used: %s; %s builds a mask", reason, attention_of(model))
        return
    register_attention()
    model.set_attn_implementation(VARLEN)  # type: ignore[operator]
    _let_padded_encoders_mask(model)
    logger.info_rank0("attention: varlen")


def _let_padded_encoders_mask(model: nn.Module) -> None:
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if family_record(config).padded_audio and attention_of(module) == VARLEN:
            set_attention(config, "sdpa")


def _why_not_varlen(model: nn.Module) -> str | None:
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    if not supports_flash_attention(model):
        return "the model does not support flash attention"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "the model caps its attention scores"
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return "the model has attention sinks"
    if getattr(config, "attention_dropout", 0.0):
        return "the model has attention dropout"
    if getattr(config, "v_head_dim", None) not in (None, getattr(config, "head_dim", None)):
        return "heads of values and keys differ in size"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return None if head_dim <= 256 and head_dim % 8 == 0 else f"heads have {head_dim} channels"
