"""Conversations of log-normal lengths as a file, and this library's own loader over it, which tokenizes and packs."""

from __future__ import annotations

import json
import math
import random
import tempfile
from pathlib import Path

WORDS = 800
"""Distinct words; each becomes about one token of the tokenizer trained on them."""


def write_chats(file, count, typical, longest):
    """Write conversations of ``typical`` words in the median (log-normal, sigma 1), from a question to an answer."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(WORDS)]

    def text(length):
        return " ".join(draw.choices(words, k=length))

    with file.open("w") as out:
        for _ in range(count):
            total = min(int(draw.lognormvariate(math.log(typical), 1.0)), longest)
            question, answer = text(max(total // 4, 1)), text(max(total - total // 4, 1))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": turns}) + "\n")


def chat_loader(row, data_parallel, vocabulary, count=2000, workers=2):
    """The loader of a row with ``chats``; every rank calls this, and one of them writes and tokenizes."""
    from veomni.data import (
        BatchShape,
        Encoder,
        Order,
        Packing,
        RecordSchema,
        Workers,
        build_dataloader,
        build_dataset,
        build_once,
        train_byte_bpe,
    )
    from veomni.data.sources.cache import lacks

    place = Path(tempfile.gettempdir()) / f"veomni_chats_{row.packed}_{row.length}_{count}"

    def write(empty):
        write_chats(empty / "chats.jsonl", count, row.packed, row.length // 2)

    build_once(place, write, lacks("chats.jsonl"))
    dataset, _ = build_dataset(str(place / "chats.jsonl"), RecordSchema("conversation"), cache_dir=place)
    return build_dataloader(
        dataset, Encoder(train_byte_bpe(dataset.texts(), min(vocabulary, 4096))),
        packing=Packing(max_seq_len=row.length, on_overflow="truncate"), order=Order(), cache_dir=place,
        shape=BatchShape(row.rows, row.rows * data_parallel.size, data_parallel.rank, data_parallel.size),
        workers=Workers(workers),
    )  # fmt: skip
