"""Tokens for a terminal: green is supervised, grey is context, what stands for media is counted."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

LEGEND = "green is supervised, grey is context"
_COUNTED_FROM = 4


def coloured(ids: Sequence[int], supervised: Sequence[bool], tokenizer: Any, counted: Collection[int] = ()) -> Text:
    """Return decoded tokens in colour.

    Args:
        ids: Token ids.
        supervised: Whether a loss is taken on each.
        tokenizer: Decodes them.
        counted: Ids that many follow each other of; they are shown once, with their number.
    """
    from rich.text import Text

    text = Text()
    tokens = list(zip(ids, supervised, strict=True))
    for (is_supervised, media), group in groupby(
        tokens, key=lambda token: (token[1], token[0] if token[0] in counted else -1)
    ):
        run = [index for index, _ in group]
        if media >= 0 and len(run) >= _COUNTED_FROM:
            text.append(f"{_safe(tokenizer.decode(run[:1]))} x {len(run)}", style="cyan")
            continue
        shown = _safe(tokenizer.decode(run, skip_special_tokens=False))
        text.append(shown, style="green" if is_supervised else "bright_black")
    return text


def _safe(text: str) -> str:
    # Data may hold escape sequences, which a terminal would obey.
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)
