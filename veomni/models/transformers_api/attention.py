"""The attention that a transformers model runs with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from veomni.compat.private_name import PrivateName

_CONFIG, _LLAMA = "transformers.configuration_utils:PreTrainedConfig", "transformers.models.llama.modeling_llama"
PRIVATE = (
    PrivateName(f"{_CONFIG}._attn_implementation", "names the attention", "AttributeError"),
    PrivateName(f"{_CONFIG}._experts_implementation", "names the experts", "AttributeError"),
    PrivateName("transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS.valid_keys", "the registered ones", "ImportError"),
    PrivateName(f"{_LLAMA}:eager_attention_forward", "each modeling file has its own", "an error: choose sdpa"),
)


_NAMES = ("_attn_implementation_internal", "_experts_implementation_internal")
"""Where a configuration keeps them."""


def attention_names() -> list[str]:
    """Return the names of attention implementations, registered ones included."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]


def attention_of(module: Any) -> str:
    """Return the name of the attention that a model, or a module with a configuration, runs with."""
    return str(module.config._attn_implementation)


def text_attention_of(model: Any) -> str:
    """Return the name of the attention that the text part of a model runs with."""
    return str(model.config.get_text_config()._attn_implementation)


def set_attention(config: Any, name: str) -> None:
    """Change the attention of one configuration, and not of those inside it."""
    config._attn_implementation = name


class ConfigWithAttention:
    """A configuration that names another attention: transformers' flash attention looks it up there."""

    def __init__(self, config: Any, name: str) -> None:
        self._config = config
        self._attn_implementation = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def eager_attention(module: nn.Module) -> Callable[..., Any] | None:
    """Return the eager attention of an attention module's own modeling file: the registry has none."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


class Implementations:
    """The attention and experts that every configuration of a model names, to be restored.

    Args:
        model: Any module; only transformers models have such configurations.
    """

    def __init__(self, model: nn.Module) -> None:
        found = (vars(module).get("config") for module in model.modules())
        configs = {id(config): config for config in found if hasattr(config, "sub_configs")}
        self._values = [(config, {name: vars(config).get(name) for name in _NAMES}) for config in configs.values()]

    def restore(self) -> None:
        """Make the configurations name what they named."""
        for config, values in self._values:
            for name, value in values.items():
                if name in vars(config):
                    setattr(config, name, value)
