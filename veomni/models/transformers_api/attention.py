"""The attention that a transformers model runs with."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

_NAMES = ("_attn_implementation_internal", "_experts_implementation_internal")
"""Where a configuration keeps them."""


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


def restoring_implementations(model: nn.Module) -> Callable[[], None]:
    """Return a function that makes every configuration of a model name the attention and experts that it names now."""
    found = {id(config): config for module in model.modules() if (config := vars(module).get("config")) is not None}
    configs = [config for config in found.values() if hasattr(config, "sub_configs")]
    return partial(_restore, [(config, {name: vars(config).get(name) for name in _NAMES}) for config in configs])


def _restore(named: list[tuple[Any, dict[str, Any]]]) -> None:
    for config, values in named:
        for name in values.keys() & vars(config).keys():
            setattr(config, name, values[name])
