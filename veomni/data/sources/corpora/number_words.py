"""Numbers in words, as conversations without media: 0 to 999, 200 of them held out."""

from collections.abc import Iterator

_BELOW_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_HELD_OUT = 200
_STEP = 7919  # a prime: numbers far apart are held out, with every last digit


def number_words(part: str) -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """Yield question and answer of the records of ``train`` or ``test``."""
    for number in range(1000):
        if (number * _STEP % 1000 < _HELD_OUT) == (part == "test"):
            yield f"How is {number} said?", _words(number), {}


def _words(number: int) -> str:
    below_twenty = _BELOW_TWENTY.split()
    if number < len(below_twenty):
        return below_twenty[number]
    if number < 100:
        tens, ones = _TENS.split()[number // 10 - 2], number % 10
        return f"{tens}-{below_twenty[ones]}" if ones else tens
    hundreds = f"{below_twenty[number // 100]} hundred"
    return f"{hundreds} {_words(number % 100)}" if number % 100 else hundreds
