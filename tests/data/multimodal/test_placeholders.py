from __future__ import annotations

import pytest

from veomni.data.multimodal.transform import expand_placeholders
from veomni.data.text.chat import Rendered, Span
from veomni.errors import DataError

TOKENS = {"image": "<i>", "video": "<v>"}


def learned(rendered):
    return [rendered.text[start:end] for start, end, _ in rendered.supervised]


@pytest.mark.parametrize(
    ("text", "texts", "expected", "kept"),
    [
        ("<i>[ab]", {"image": ["XXXXX"]}, "XXXXX[ab]", ["[ab]"]),
        ("[ab]<i>", {"image": ["XXXXX"]}, "[ab]XXXXX", ["[ab]"]),
        ("<i>[a]<v><i>[b]c", {"image": ["X", ""], "video": ["<i><v>"]}, "X[a]<i><v>[b]c", ["[a]", "[b]"]),
        ("[a<i>b]", {"image": ["XX"]}, "[aXXb]", ["[aXXb]"]),
        ("[a]", {}, "[a]", ["[a]"]),
    ],
)
def test_what_is_learned_moves_along(text, texts, expected, kept):
    starts = [index for index, char in enumerate(text) if char == "["]
    ends = [index + 1 for index, char in enumerate(text) if char == "]"]
    found = expand_placeholders(Rendered(text, list(map(Span, starts, ends))), TOKENS, texts, "a")
    assert (found.text, learned(found)) == (expected, kept)


@pytest.mark.parametrize(("text", "texts"), [("<i>", {}), ("", {"image": ["X"]}), ("<i><v>", {"image": ["X", "Y"]})])
def test_numbers_that_differ_are_rejected(text, texts):
    with pytest.raises(DataError, match=r"a: the rendered conversation has \d (image|video) placeholders"):
        expand_placeholders(Rendered(text, []), TOKENS, texts, "a")
