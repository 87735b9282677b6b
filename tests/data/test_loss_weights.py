"""What messages and tokens weigh arrives with the labels they belong to, and only where some weigh neither 0 nor 1."""

from __future__ import annotations

import itertools
import json
import re

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.data.loaders import dataset_of, make_loader
from tests.data.stream_files import jsonl
from veomni.batch.counts import token_weight
from veomni.batch.fields import IGNORE_INDEX
from veomni.batch.split import SequenceShard
from veomni.data import CHAT_TEMPLATES
from veomni.data.sources.records import Document, conversation_of
from veomni.data.text.chat import tokenize_conversations

TURNS = [
    {"role": "user", "content": "Where do rows end?"},
    {"role": "assistant", "content": "At the last token, naïvely ☃.", "weight": 0.25},
    {"role": "user", "content": "And documents?"},
    {"role": "assistant", "content": "I do not know.", "weight": 0},
    {"role": "user", "content": "Really?"},
    {"role": "assistant", "content": "Where positions restart.", "weight": 3},
]
ENDS = {"llama3": "<|eot_id|>", "gemma3": "<end_of_turn>"}


def weighs(tokens):
    """A weight for every token that its id tells, a quarter of them 0 and a quarter 1; exact in float32."""
    return [(token % 4) ** 2 / 4 if token % 4 != 2 else 1.0 for token in tokens]


def records(count=40):
    """Token ids, no two documents alike: weighed, with labels as well, with weights of 0 and 1, and without any."""
    draw, rows = torch.Generator().manual_seed(3), []
    for number in range(count):
        ids = torch.randint(3, 128, (int(torch.randint(4, 22, (), generator=draw)),), generator=draw).tolist()
        row = {"input_ids": ids}
        if number % 4 < 2:
            row["loss_weights"] = weighs(ids)
        if number % 4 == 1:
            row["labels"] = [IGNORE_INDEX if at % 3 == 0 else token for at, token in enumerate(ids)]
        if number % 4 == 2:
            row["loss_weights"] = [number % 8 != 2 and 1, *[token % 2 for token in ids[1:]]]
        rows.append(row)
    return rows


def expected(row):
    """Labels and weights of a record as a document of its own, the weights where there is a label."""
    ids = row["input_ids"]
    given = row.get("loss_weights") or [1.0] * len(ids)
    labels = row.get("labels") or ids
    pairs = [
        (label, weight) if label != IGNORE_INDEX and weight else (IGNORE_INDEX, 1.0)
        for label, weight in zip(labels, given, strict=True)
    ]
    return [(IGNORE_INDEX, 1.0), *pairs[1:]]


def documents_of(micro):
    """Ids, and labels with their weights, of each document in whole rows."""
    weights = micro.fields().get("loss_weights", torch.ones(micro["input_ids"].shape))
    for row, filled in enumerate(micro.rows.row_lengths):
        starts = [at for at in (micro["position_ids"][row] == 0).nonzero().flatten().tolist() if at < filled]
        for start, stop in itertools.pairwise([*starts, filled]):
            labels = micro["labels"][row, start:stop].tolist()
            given = weights[row, start:stop].tolist()
            pairs = [(a, b if a != IGNORE_INDEX else 1.0) for a, b in zip(labels, given, strict=True)]
            yield tuple(micro["input_ids"][row, start:stop].tolist()), pairs


def loader_of(folder, tokenizer, rows, *, data_type="pretokenized", streaming=False, **options):
    dataset = dataset_of(str(jsonl(folder / "t.jsonl", rows)), data_type=data_type, streaming=streaming)
    options = {"max_seq_len": 32, "global_batch_size": 4, "micro_batch_size": 2, "epochs": 1, **options}
    return make_loader(dataset, tokenizer, stream_shards=2, pin_memory=False, cache_dir=folder / "cache",
                            **options)  # fmt: skip


@pytest.mark.parametrize("marks", [True, False], ids=["marks", "prefixes"])
@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen-vl", "gemma3"])
def test_every_turn_weighs_what_it_says(name, marks, tokenizer):
    template = CHAT_TEMPLATES.get(name)
    template = template if marks else re.sub(r"\{%-? (end)?generation %\}", "", template)
    conversation = conversation_of(Document({"messages": TURNS}, "here"), "messages")
    [(ids, weights)] = tokenize_conversations([conversation], ["here"], tokenizer, template)
    groups = itertools.groupby(zip(ids, weights, strict=True), lambda pair: pair[1])
    found = [(weight, tokenizer.decode([token for token, _ in run]).removesuffix("\n")) for weight, run in groups]
    end = ENDS.get(name, "<|im_end|>")
    said = [(turn["weight"], turn["content"] + end) for turn in TURNS[1::2] if turn["weight"]]
    assert [run for run in found if run[0]] == said


@pytest.mark.parametrize("streaming", [False, True])
def test_packed_tokens_keep_their_weights(streaming, tokenizer, tmp_path):
    rows = records()
    loader = loader_of(tmp_path, tokenizer, rows, streaming=streaming, micro_batch_size=1)
    micros = [micro for step in loader for micro in step]
    found = dict(itertools.chain.from_iterable(documents_of(micro) for micro in micros))
    assert found == {tuple(row["input_ids"]): expected(row) for row in rows}
    for micro in micros:
        fractions = any(weight != 1 for _, pairs in documents_of(micro) for _, weight in pairs)
        assert ("loss_weights" in micro) == fractions
        if fractions:
            assert micro["loss_weights"].dtype is torch.float32
        total = sum(weight for _, pairs in documents_of(micro) for label, weight in pairs if label != IGNORE_INDEX)
        assert token_weight(micro) == total
    assert {"loss_weights" in micro for micro in micros} == {True, False}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("on_overflow", ["truncate", "split"])
def test_documents_are_cut_with_their_weights(on_overflow, streaming, tokenizer, tmp_path):
    ids = [5, 6, 7, 9, 11, 12, 14, 10, 6, 2, 2, 10]
    weights = [0.5, 0, 3, 1, 0.25, 0.5, 2, 0, 1, 1, 0, 1]
    rows = [{"input_ids": ids, "loss_weights": weights}, {"input_ids": [3, 4, 5]}]
    loader = loader_of(tmp_path, tokenizer, rows, streaming=streaming, on_overflow=on_overflow, max_seq_len=4,
                       strategy="none", micro_batch_size=1)  # fmt: skip
    micros = [micro for step in loader for micro in step if micro.rows.document_lengths]
    cuts = [slice(0, 4)] if on_overflow == "truncate" else [slice(0, 4), slice(4, 8), slice(8, 12)]
    pieces = [{"input_ids": ids[cut], "loss_weights": weights[cut]} for cut in cuts] + [rows[1]]
    found = dict(itertools.chain.from_iterable(documents_of(micro) for micro in micros))
    assert found == {tuple(piece["input_ids"]): expected(piece) for piece in pieces}
    with_key = {tuple(ids) for micro in micros if "loss_weights" in micro for ids, _ in documents_of(micro)}
    assert with_key == {tuple(ids[cut]) for cut in cuts[:2]}, "the last piece has weights of 0 and 1"


def on_disk(folder):
    """The table of a cache's only entry: ids, and what tokens weigh where that is not 1."""
    (found,) = (path for path in (folder / "cache").iterdir() if path.is_dir())
    assert {path.name for path in found.iterdir()} == {"tokens.arrow", "checksum"}
    return pa.ipc.open_file(found / "tokens.arrow").read_all()


def test_only_documents_with_weights_are_larger_on_disk(tokenizer, tmp_path):
    kinds = {"none": [3], "zeros": [2, 3], "all": [0, 1, 2, 3]}
    tables = {}
    for name, kept in kinds.items():
        rows = [row for number, row in enumerate(records()) if number % 4 in kept]
        (tmp_path / name).mkdir()
        loader_of(tmp_path / name, tokenizer, rows)
        tables[name] = on_disk(tmp_path / name)
        assert tables[name]["ids"].type == pa.large_list(pa.uint16())
        assert [len(ids) for ids in tables[name]["ids"]] == [len(row["input_ids"]) for row in rows]
    held = {name: {key: table[key].drop_null() for key in ("supervised", "weights")} for name, table in tables.items()}
    assert not len(held["none"]["supervised"]) + len(held["none"]["weights"])
    assert 0 < len(held["zeros"]["supervised"]) < len(tables["zeros"])
    assert not len(held["zeros"]["weights"])
    weighed = [row for row in records() if any(weight not in (0, 1) for _, weight in expected(row))]
    assert [len(one) for one in held["all"]["weights"]] == [len(row["input_ids"]) for row in weighed]


def test_sides_of_a_pair_weigh_what_they_say(tokenizer, tmp_path):
    question = {"role": "user", "content": "Rain?"}
    sides = {"chosen": ("No.", 0.5), "rejected": ("Yes.", 2)}
    row = {
        name: [question, {"role": "assistant", "content": content, "weight": weight}]
        for name, (content, weight) in sides.items()
    }
    loader = loader_of(tmp_path, tokenizer, [row], data_type="preference", streaming=True, chat_template="chatml",
                       max_seq_len=256)  # fmt: skip
    micro = next(micro for step in loader for micro in step if micro.rows.document_lengths)
    for (ids, pairs), (content, weight) in zip(documents_of(micro), sides.values(), strict=True):
        learned = [token for token, (label, _) in zip(ids, pairs, strict=True) if label != IGNORE_INDEX]
        assert tokenizer.decode(learned) == f"{content}<|im_end|>"
        assert {given for label, given in pairs if label != IGNORE_INDEX} == {weight}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_goes_on_with_its_weights(streaming, tokenizer, tmp_path):
    def make():
        return loader_of(tmp_path, tokenizer, records(), streaming=streaming, epochs=2)

    loader = make()
    steps = iter(loader)
    next(steps)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = make()
    resumed.load_state_dict(state)
    rest = [list(documents_of(micro)) for step in steps for micro in step]
    assert rest == [list(documents_of(micro)) for step in resumed for micro in step]
    assert any(weight != 1 for documents in rest for _, pairs in documents for _, weight in pairs)


@pytest.mark.parametrize(("ulysses", "cp"), [(2, 1), (3, 1), (1, 2), (2, 2)])
def test_weights_are_shifted_with_the_labels(ulysses, cp, tokenizer, tmp_path):
    rows = [row for row in records() if "loss_weights" in row]
    micro = next(micro for step in loader_of(tmp_path, tokenizer, rows) for micro in step)
    parts = [SequenceShard(ulysses, u, cp, c) for u in range(ulysses) for c in range(cp)]
    cut = [micro.split(part) for part in parts]
    length = cut[0]["labels"].shape[1] * len(parts)
    labels, weights = torch.full((2, length), -7), torch.full((2, length), -7.0)
    for part, piece in zip(parts, cut, strict=True):
        labels[:, part.indices(length)], weights[:, part.indices(length)] = piece["labels"], piece["loss_weights"]
    kept = micro["labels"][:, 1:] != IGNORE_INDEX
    assert torch.equal(labels[:, :31], micro["labels"][:, 1:])
    assert torch.equal(weights[:, :31][kept], micro["loss_weights"][:, 1:][kept])
    assert (labels[:, 31:] == IGNORE_INDEX).all()
    assert sum(map(token_weight, cut)) == token_weight(micro)


def test_weights_that_float32_cannot_tell_from_0_and_1_are_those():
    from veomni.data.text.tokens import Tokens

    assert Tokens.of([1, 2, 3], [1 + 1e-12, 0, 1e-60]).weights.tolist() == [True, False, False]
    assert Tokens.of([1, 2], [0.1, 0]).weights.tolist() == [np.float32(0.1), 0]
