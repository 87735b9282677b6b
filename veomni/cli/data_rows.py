"""Text as the model will see it: packed rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice, pairwise
from typing import TYPE_CHECKING, Any

from veomni.batch.micro_batch import MicroBatch
from veomni.cli.token_colours import LEGEND, coloured

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from veomni.data import PackedLoader, StreamLoader
    from veomni.run_config import Config


def show_rows(config: Config, console: Console, rows: int, counted: int) -> list[int]:
    """Print the rows that training starts with, and how full rows are; return the lengths of samples.

    Args:
        config: Names data and tokenizer.
        console: Where to print.
        rows: How many rows to print.
        counted: How many rows of a stream are measured; of data that is indexed, all are.
    """
    loader, tokenizer = _loader(config)
    read: Iterator[MicroBatch] = chain.from_iterable(loader)
    if loader.sample_lengths is None:
        return _show_stream(list(islice(read, max(rows, counted))), config.data.max_seq_len, tokenizer, console, rows)
    micro_batches = read
    for number, row in enumerate(islice(micro_batches, rows), 1):
        console.rule(f"row {number}")
        for part in _documents(row, tokenizer):
            console.print(part)
    filled = f"{loader.steps_per_epoch} rows of {config.data.max_seq_len} tokens, {100 * loader.fill:.2f} % filled"
    console.print(f"{filled}; {LEGEND}", style="bold")
    return loader.sample_lengths.tolist()


def _show_stream(read: Sequence[MicroBatch], capacity: int, tokenizer: Any, console: Console, rows: int) -> list[int]:
    """Print rows of a stream with the places their documents come from, and how full those read are."""
    lengths: list[int] = []
    for number, row in enumerate(read, 1):
        lengths += row.rows.document_lengths
        if number > rows:
            continue
        console.rule(f"row {number}")
        for name, source in zip(row.origin.document_ids, row.origin.document_sources, strict=True):
            console.print(f"{row.origin.source_names[source]}: {name.partition('/')[2]}", style="cyan")
        for part in _documents(row, tokenizer):
            console.print(part)
    filled = f"the first {len(read)} rows of {capacity} tokens: {100 * sum(lengths) / (len(read) * capacity):.2f} %"
    console.print(f"{filled} filled; {LEGEND}", style="bold")
    return lengths


def _loader(config: Config) -> tuple[PackedLoader | StreamLoader, Any]:
    from veomni.data import Encoder, Order, Packing, Workers, build_dataloader

    data = config.data
    dataset, _ = config.open_data()
    tokenizer = config.build_tokenizer(dataset)
    epochs = None if dataset.indexed is None else 1
    loader = build_dataloader(
        dataset,
        Encoder(tokenizer, data.chat_template),
        packing=data.make(Packing),
        order=data.make(Order, seed=config.train.seed, epochs=epochs),
        workers=Workers(pin_memory=False),
        cache_dir=data.cache_dir,
    )
    return loader, tokenizer


def _documents(row: MicroBatch, tokenizer: Any) -> Iterator[Text]:
    """Yield a headline and the text of each document of a one-row micro-batch, and how much of the row is padding."""
    from rich.text import Text

    from veomni.batch.fields import IGNORE_INDEX

    ids = row["input_ids"].flatten().tolist()
    supervised = [label != IGNORE_INDEX for label in row["labels"].flatten().tolist()]
    starts = [index for index, position in enumerate(row["position_ids"].flatten().tolist()) if position == 0]
    bounds = [*starts, len(ids)]
    for number, (start, end) in enumerate(pairwise(bounds), 1):
        if end == len(ids) and not any(supervised[start:]) and len(set(ids[start:])) == 1:
            yield Text(f"padding: {end - start} tokens", style="bold")
        else:
            headline = f"document {number}: {end - start} tokens, {sum(supervised[start:end])} supervised\n"
            yield Text.assemble((headline, "bold"), coloured(ids[start:end], supervised[start:end], tokenizer))
