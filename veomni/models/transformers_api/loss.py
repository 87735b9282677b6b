"""The loss of a transformers model."""

from __future__ import annotations

from veomni.compat.private_name import PrivateName

PRIVATE = (
    PrivateName("transformers.modeling_utils:PreTrainedModel.loss_function",
                "what a model calls for its loss; its setter keeps another one in _loss_function", "AttributeError"),
)  # fmt: skip

LOSS_FUNCTION = "_loss_function"
"""The attribute of an instance in which ``model.loss_function = ...`` is kept; without it, its class's is used."""
