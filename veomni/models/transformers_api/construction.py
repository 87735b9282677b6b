"""Constructing and initialising transformers models."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import nn

from veomni.models.transformers_api.attention import attention_of
from veomni.models.transformers_api.capabilities import is_pretrained

LOSS_FUNCTION = "_loss_function"
"""The attribute of an instance in which ``model.loss_function = ...`` is kept; without it, its class's is used."""


def construct(model_class: Any, config: Any, attention: str) -> nn.Module:
    """Construct a transformers model in float32 on the current default device."""
    return model_class._from_config(config, dtype=torch.float32, attn_implementation=attention)


def construct_again(model: nn.Module, config: Any = None) -> nn.Module:
    """Construct another model of the class of ``model``, and of its configuration unless one is given."""
    return construct(type(model), config or deepcopy(model.config), attention_of(model))


def initialisers(model: nn.Module) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield (name of a module, function that initialises its own parameters and buffers in place), children first.

    The function is ``_init_weights`` of the transformers model around the module, in the order and with the owners of
    ``PreTrainedModel.initialize_weights``; of other modules ``reset_parameters``.
    """

    def walk(module: nn.Module, name: str, owner: Any) -> Iterator[tuple[str, Callable[[], object]]]:
        owner = module if is_pretrained(module) else owner
        for child_name, child in module.named_children():
            yield from walk(child, f"{name}.{child_name}" if name else child_name, owner)
        yield name, partial(_reset, module) if owner is None else partial(owner._init_weights, module)

    return walk(model, "", None)


def _reset(module: nn.Module) -> None:
    for name in ("reset_parameters", "_reset_parameters"):
        method = getattr(module, name, None)
        if callable(method):
            method()
            return


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Return ``{tied parameter: the parameter it shares its storage with}``; empty for other modules."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})
