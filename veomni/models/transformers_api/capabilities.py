"""What a transformers class or model declares about itself."""

import re
import sys
from typing import Any

from torch import nn


def is_pretrained(module: nn.Module) -> bool:
    """Whether ``module`` is a transformers model; does not import transformers to find out."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def supports_sdpa(model_class: type[nn.Module]) -> bool:
    """Whether a transformers class declares that PyTorch's scaled-dot-product attention is exact."""
    return bool(getattr(model_class, "_supports_sdpa", False))


def supports_flash_attention(model: nn.Module) -> bool:
    """Return whether a model's attention works on packed rows without a mask."""
    return bool(getattr(model, "_supports_flash_attn", False))


def caps_scores(config: Any) -> bool:
    """Whether attention scores have a soft cap, as in Gemma 2.

    PyTorch's scaled-dot-product attention has none; transformers 5.17 leaves it out silently.
    """
    return getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None


def keeps_fp32(model: nn.Module, parameter: str) -> bool:
    """Whether a transformers model keeps the named parameter in float32 under bfloat16.

    ``_keep_in_fp32_modules`` does not count: it applies under float16 only.
    """
    patterns = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return any(re.search(pattern.replace("*", ".*"), parameter) for pattern in patterns)


def layer_classes(model: nn.Module) -> set[str]:
    """Return the class names of the layers that a transformers model must not be split inside of."""
    return set(getattr(model, "_no_split_modules", None) or ())


def set_config_flag(config: Any, name: str, value: Any) -> None:
    """Set an attribute on a configuration and on its (decoding) text part, where they have it."""
    for part in {id(c): c for c in (config, config.get_text_config(decoder=True))}.values():
        if hasattr(part, name):
            setattr(part, name, value)
