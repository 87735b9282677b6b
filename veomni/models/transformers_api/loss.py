"""The loss of a transformers model."""

from __future__ import annotations

from veomni.compat.private_name import PrivateName

_MODEL = "transformers.modeling_utils:PreTrainedModel"
PRIVATE = (PrivateName(f"{_MODEL}.loss_function", "its setter keeps a loss in _loss_function", "AttributeError"),)

LOSS_FUNCTION = "_loss_function"
"""The attribute of an instance in which ``model.loss_function = ...`` is kept; without it, its class's is used."""
