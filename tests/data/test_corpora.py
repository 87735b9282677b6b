"""Built-in corpora: what they claim to hold is in their media, and parts have nothing in common."""

from __future__ import annotations

import base64
import io
import json
import sys

import numpy as np
import pytest

from tests.data.loaders import dataset_of
from veomni.data.sources.corpora import corpus_files
from veomni.errors import MissingExtraError

ROWS, COLUMNS, KEYS = (697, 770, 852, 941), (1209, 1336, 1477), ("123", "456", "789", "*0#")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("corpora")


def records(name, cache):
    (path,) = corpus_files(name, cache)
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer(record):
    return record["messages"][-1]["content"]


def content(record, field):
    (item,) = record[field]
    return io.BytesIO(base64.b64decode(item["base64"]))


def test_digits_are_the_scans_of_scikit_learn(cache):
    from PIL import Image
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    parts = {part: records(f"handwritten-digits-{part}", cache) for part in ("train", "test")}
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 1437, "test": 360}
    left = {"train": iter(parts["train"]), "test": iter(parts["test"])}
    for number, (pixels, digit) in enumerate(zip(images, digits, strict=True)):
        record = next(left["train" if number % 5 else "test"])
        scan = np.asarray(Image.open(content(record, "images")))
        assert np.array_equal((scan / 255 * 16).round(), pixels.reshape(8, 8)), number
        assert answer(record) == str(digit)


def test_drawings_are_the_same_scans(cache):
    for part in ("train", "test"):
        scans, drawings = (records(f"{name}-{part}", cache) for name in ("handwritten-digits", "digit-drawings"))
        assert len(scans) == len(drawings)
        for scan, drawing in zip(scans, drawings, strict=True):
            from PIL import Image

            question, reply = drawing["messages"]
            ((codes,),) = ([part["codes"] for part in reply["content"]],)
            shades = (np.asarray(Image.open(content(scan, "images"))) / 255 * 16).round().astype(int)
            assert codes == shades.flatten().tolist()
            assert question["content"] == f"Draw the digit {answer(scan)}."


def heard(samples, rate):
    """The key whose two frequencies are strongest, by correlation with sines."""
    times = np.arange(len(samples)) / rate
    powers = [[abs(np.exp(-2j * np.pi * frequency * times) @ samples) for frequency in group]
              for group in (ROWS, COLUMNS)]  # fmt: skip
    return KEYS[int(np.argmax(powers[0]))][int(np.argmax(powers[1]))]


def test_tones_are_those_of_the_keys(cache):
    import soundfile

    train, test = (records(f"keypad-tones-{part}", cache) for part in ("train", "test"))
    assert (len(train), len(test)) == (3000, 300)
    assert not {row["audios"][0]["base64"] for row in train} & {row["audios"][0]["base64"] for row in test}
    right = [heard(*soundfile.read(content(record, "audios"))) == answer(record) for record in test]
    assert np.mean(right) > 0.97  # some lie in noise as loud as they are
    assert {answer(record) for record in test} == {answer(record) for record in train} == set("".join(KEYS))


def test_numbers_are_in_words(cache):
    rows = [row for part in ("train", "test") for row in records(f"number-words-{part}", cache)]
    said = {row["messages"][0]["content"]: answer(row) for row in rows}
    assert len(rows) == len(said) == len(set(said.values())) == 1000
    for number, words in {
        0: "zero", 13: "thirteen", 20: "twenty", 41: "forty-one", 300: "three hundred",
        712: "seven hundred twelve", 999: "nine hundred ninety-nine",
    }.items():  # fmt: skip
        assert said[f"How is {number} said?"] == words
    held_out = records("number-words-test", cache)
    assert len(held_out) == 200
    assert {int(row["messages"][0]["content"].split()[2]) % 10 for row in held_out} == set(range(10))


def test_they_are_data_by_name(cache):
    for streaming in (False, True):
        dataset = dataset_of(
            "number-words-train", data_type="conversation", cache_dir=cache, streaming=streaming
        )  # fmt: skip
        assert sum(1 for _ in dataset) == 800


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match="scikit-learn") as found:
        corpus_files("handwritten-digits-train", tmp_path)
    assert "veomni[dev]" in found.value.fix
    assert not list(tmp_path.rglob("records.jsonl"))
