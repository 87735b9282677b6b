"""Numbers in words, as conversations without media: 0 to 999, 200 of them held out."""

from __future__ import annotations

from typing import Any

from veomni.data.sources.corpora.records_file import question_answer

_BELOW_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_HELD_OUT = 200
_STEP = 7919  # a prime: numbers far apart are held out, with every last digit


def number_words(part: str) -> list[dict[str, Any]]:
    """Return the records of ``train`` or ``test``."""
    chosen = [number for number in range(1000) if (number * _STEP % 1000 < _HELD_OUT) == (part == "test")]
    return [{"messages": question_answer(f"How is {number} said?", _words(number))} for number in chosen]


def _words(number: int) -> str:
    below_twenty = _BELOW_TWENTY.split()
    if number < len(below_twenty):
        return below_twenty[number]
    if number < 100:
        tens, ones = _TENS.split()[number // 10 - 2], number % 10
        return f"{tens}-{below_twenty[ones]}" if ones else tens
    hundreds = f"{below_twenty[number // 100]} hundred"
    return f"{hundreds} {_words(number % 100)}" if number % 100 else hundreds
