"""``veomni data preview``: what the model will see, in colour, and how long documents are."""

import argparse
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from veomni.batch.fields import IGNORE_INDEX
from veomni.batch.micro_batch import MicroBatch
from veomni.cli.data_documents import show_documents
from veomni.cli.drawing import LEGEND, coloured, plot_lengths
from veomni.data import Encoder, Order, PackedLoader, Packing, StreamLoader, Workers, build_dataloader
from veomni.run_config import Config, load_config


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print what training starts with, and how full rows are; draw the lengths of documents."""
    config = load_config(rest[1:] if rest[:1] == ["preview"] else rest)
    console = Console(highlight=False, soft_wrap=True)
    show = show_documents if config.data.has_media else _show_rows
    groups = show(config, console, arguments.rows, arguments.documents)
    out = Path(arguments.plot or Path(config.train.output_dir) / "data_lengths.png")
    names = ", ".join(source.name for source in config.data.sources) or config.data.train_path
    count = sum(map(len, groups.values()))
    plot_lengths(groups, config.data.max_seq_len, out, f"{count} documents of {names}")
    console.print(f"lengths: {out}", style="bold")


def _show_rows(config: Config, console: Console, shown: int, counted: int) -> dict[str, list[int]]:
    """Print the first rows and how full all are, of a stream the first ``counted``; return the lengths of samples."""
    loader, tokenizer = _loader(config)
    rows: Iterator[MicroBatch] = chain.from_iterable(loader)
    capacity, indexed = config.data.max_seq_len, loader.sample_lengths is not None
    lengths: list[int] = [] if loader.sample_lengths is None else loader.sample_lengths.tolist()
    read = 0
    for read, row in enumerate(islice(rows, shown if indexed else max(shown, counted)), 1):
        if not indexed:
            lengths += row.rows.document_lengths
        if read <= shown:
            console.rule(f"row {read}")
            for part in chain([] if indexed else _origins(row), _documents(row, tokenizer)):
                console.print(part)
    filled = f"{loader.steps_per_epoch} rows of {capacity} tokens, {100 * loader.fill:.2f} % filled"
    if not indexed:
        filled = f"the first {read} rows of {capacity} tokens: {100 * sum(lengths) / (read * capacity):.2f} % filled"
    console.print(f"{filled}; {LEGEND}", style="bold")
    return {"documents": lengths}


def _loader(config: Config) -> tuple[PackedLoader | StreamLoader, Any]:
    data = config.data
    dataset, _ = config.open_data()
    tokenizer = config.build_tokenizer(dataset)
    loader = build_dataloader(
        dataset,
        Encoder(tokenizer, data.chat_template),
        packing=data.make(Packing),
        order=data.make(Order, seed=config.train.seed, epochs=None if dataset.indexed is None else 1),
        workers=Workers(pin_memory=False),
        cache_dir=data.cache_dir,
    )
    return loader, tokenizer


def _origins(row: MicroBatch) -> Iterator[Text]:
    for name, source in zip(row.origin.document_ids, row.origin.document_sources, strict=True):
        yield Text(f"{row.origin.source_names[source]}: {name.partition('/')[2]}", style="cyan")


def _documents(row: MicroBatch, tokenizer: Any) -> Iterator[Text]:
    """Yield a headline and the text of each document of a one-row micro-batch, and how much of the row is padding."""
    ids, labels = (row[key].flatten().tolist() for key in ("input_ids", "labels"))
    supervised = [label != IGNORE_INDEX for label in labels]
    start = 0
    for number, length in enumerate(row.rows.document_lengths, 1):
        own = slice(start, start := start + length)
        headline = f"document {number}: {length} tokens, {sum(supervised[own])} supervised\n"
        yield Text.assemble((headline, "bold"), coloured(ids[own], supervised[own], tokenizer))
    if start < len(ids):
        yield Text(f"padding: {len(ids) - start} tokens", style="bold")
