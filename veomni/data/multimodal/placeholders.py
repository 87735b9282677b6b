"""Each placeholder of a rendered conversation becomes as many tokens as its image, video or audio clip has features."""

import re
from collections.abc import Mapping, Sequence

from veomni.data.text.chat import Rendered
from veomni.errors import DataError


def expand_placeholders(
    rendered: Rendered, tokens: Mapping[str, str], texts: Mapping[str, Sequence[str]], where: str
) -> Rendered:
    """Put text in the place of placeholders, and move what is supervised along.

    ``rendered`` has one placeholder per item: of each kind of media the one in ``tokens``, which the ``texts`` of that
    kind replace in order.

    Raises:
        DataError: there are more placeholders of a kind than items, or fewer.
    """
    found = list(re.finditer("|".join(map(re.escape, tokens.values())) or r"(?!)", rendered.text))
    left = {}
    for kind, token in tokens.items():
        _require_equal(kind, token, sum(match.group() == token for match in found), len(texts.get(kind, ())), where)
        left[token] = iter(texts.get(kind, ()))
    pieces, moves, at, moved = [], [(0, 0)], 0, 0
    for match in found:
        text = next(left[match.group()])
        pieces += [rendered.text[at : match.start()], text]
        at = match.end()
        moved += len(text) - len(match.group())
        moves.append((at, moved))
    supervised = [
        span._replace(start=_moved(span.start, moves), stop=_moved(span.stop, moves)) for span in rendered.supervised
    ]
    return Rendered("".join([*pieces, rendered.text[at:]]), supervised)


def _require_equal(kind: str, token: str, places: int, items: int, where: str) -> None:
    counts = f"{places} {kind} placeholders ({token}), the record {items} {kind}s"
    problem = f"{where}: the rendered conversation has {counts}"
    if places > items:
        raise DataError(problem, f"give the missing media, or take {token} out of the text")
    if places < items:
        raise DataError(problem, "the chat template leaves media out: use another one", "Encoder.chat_template")


def _moved(place: int, moves: Sequence[tuple[int, int]]) -> int:
    """Move the end of a span, which lies within no placeholder, by what was inserted before it."""
    return place + [moved for at, moved in moves if at <= place][-1]
