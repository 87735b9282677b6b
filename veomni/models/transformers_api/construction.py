"""Constructing and initialising transformers models."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import nn

from veomni.compat.private_name import PrivateName
from veomni.models.transformers_api.attention import attention_of
from veomni.models.transformers_api.capabilities import is_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_MODEL = "transformers.modeling_utils:PreTrainedModel"
PRIVATE = (
    PrivateName(f"{_MODEL}._from_config", "builds with dtype and attention", "AttributeError", ("config", "kwargs")),
    PrivateName(f"{_MODEL}._init_weights", "a class's own initial values", "AttributeError", ("module",)),
)  # fmt: skip


def construct(model_class: type[PreTrainedModel], config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    """Construct a transformers model in float32 on the current default device."""
    return model_class._from_config(config, dtype=torch.float32, attn_implementation=attention)


def construct_again(model: nn.Module, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """Construct another model of the class of ``model``, and of its configuration unless one is given."""
    return construct(type(model), config or deepcopy(model.config), attention_of(model))  # type: ignore[arg-type]


InitialiserEntry = tuple[str, nn.Module, nn.Module | None]


def initialisers(model: nn.Module) -> Iterator[InitialiserEntry]:
    """Yield (name, module, transformers model whose ``_init_weights`` is responsible for it), children first.

    The order and the owner are those of ``PreTrainedModel.initialize_weights``.
    """

    def walk(module: nn.Module, name: str, owner: nn.Module | None) -> Iterator[InitialiserEntry]:
        owner = module if is_pretrained(module) else owner
        for child_name, child in module.named_children():
            yield from walk(child, f"{name}.{child_name}" if name else child_name, owner)
        yield name, module, owner

    return walk(model, "", None)


def init_weights(owner: nn.Module, module: nn.Module) -> None:
    """Initialise one module's own parameters and buffers in place, as its model's class defines."""
    owner._init_weights(module)  # type: ignore[operator]


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Return ``{tied parameter: the parameter it shares its storage with}``; empty for other modules."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})
