"""Each placeholder of a rendered conversation becomes as many tokens as its image, video or audio clip has features."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from veomni.data.text.chat import Rendered, Span
from veomni.errors import DataError


def expand_placeholders(
    rendered: Rendered, tokens: Mapping[str, str], texts: Mapping[str, Sequence[str]], where: str
) -> Rendered:
    """Put text in the place of placeholders, and move what is supervised along.

    Args:
        rendered: A conversation with one placeholder per item.
        tokens: The placeholder of each kind of media.
        texts: What takes the places of each kind's placeholders, in order.
        where: Names the conversation, for messages.

    Raises:
        DataError: there are more placeholders of a kind than items, or fewer.
    """
    kinds = {token: kind for kind, token in tokens.items()}
    found = list(re.finditer("|".join(map(re.escape, kinds)) or r"(?!)", rendered.text))
    for kind, token in tokens.items():
        _require_equal(kind, token, sum(match.group() == token for match in found), len(texts.get(kind, ())), where)
    left = {kind: iter(texts.get(kind, ())) for kind in tokens}
    pieces, moves, at, moved = [], [(0, 0)], 0, 0
    for match in found:
        text = next(left[kinds[match.group()]])
        pieces += [rendered.text[at : match.start()], text]
        at = match.end()
        moved += len(text) - len(match.group())
        moves.append((at, moved))
    return Rendered("".join([*pieces, rendered.text[at:]]), [_shifted(span, moves) for span in rendered.supervised])


def _require_equal(kind: str, token: str, places: int, items: int, where: str) -> None:
    problem = (
        f"{where}: the rendered conversation has {places} {kind} placeholders ({token}), the record {items} {kind}s"
    )
    if places > items:
        raise DataError(problem, f"give the missing media, or take {token} out of the text")
    if places < items:
        raise DataError(problem, "the chat template leaves media out: use another one", "Encoder.chat_template")


def _shifted(span: Span, moves: Sequence[tuple[int, int]]) -> Span:
    """Move a span by what was inserted before each of its ends; none of them lies within a placeholder."""
    start, end = (place + [moved for at, moved in moves if at <= place][-1] for place in span[:2])
    return Span(start, end, span.weight)
