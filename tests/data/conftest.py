"""One tokenizer for all tests of the package, trained on the spot."""

from __future__ import annotations

import json

import pytest

from veomni.data import train_byte_bpe

WORDS = ["the", "model", "reads", "a", "row", "of", "many", "short", "documents", "and", "learns", "what", "comes"]
DOCUMENTS = 131


def sentence(number: int) -> str:
    """A text of its own for every number, of a length that varies."""
    return f"{number}: " + " ".join(WORDS[(number * 7 + k) % len(WORDS)] for k in range(3 + number * 5 % 17))


@pytest.fixture(scope="session")
def tokenizer():
    return train_byte_bpe([sentence(number) for number in range(300)], 400)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """JSONL of different texts."""
    path = tmp_path_factory.mktemp("corpus") / "train.jsonl"
    path.write_text("".join(json.dumps({"text": sentence(number)}) + "\n" for number in range(DOCUMENTS)))
    return path
