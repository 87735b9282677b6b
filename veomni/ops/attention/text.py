"""Choose the attention of a transformers model's text part."""

from __future__ import annotations

from typing import Any

UNSPLIT_ATTENTION = "_veomni_unsplit_attention"
"""The attribute for the attention of a model before its rows were split."""


def use_attention(body: Any, name: str) -> None:
    """Make the text part of a transformers model run with the attention called ``name``; towers keep theirs."""
    text = body.config.get_text_config()
    parts = [key for key in body.config.sub_configs if getattr(body.config, key, None) is text]
    body.set_attn_implementation({parts[0]: name} if parts else name)
