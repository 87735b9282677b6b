"""Text as the model will see it: packed rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, islice, pairwise
from typing import TYPE_CHECKING, Any

from veomni.cli.token_colours import LEGEND, coloured

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from veomni.config import Config
    from veomni.data import PackedDataLoader


def show_rows(config: Config, console: Console, rows: int) -> list[int]:
    """Print the rows that training starts with, and how full all rows are; return the length of every sample."""
    loader, tokenizer = _loader(config)
    micro_batches = chain.from_iterable(loader)
    for number, row in enumerate(islice(micro_batches, rows), 1):
        console.rule(f"row {number}")
        for part in _documents(row, tokenizer):
            console.print(part)
    filled = f"{len(loader)} rows of {config.data.max_seq_len} tokens, {100 * loader.fill:.2f} % filled"
    console.print(f"{filled}; {LEGEND}", style="bold")
    return loader.sample_lengths.tolist()


def _loader(config: Config) -> tuple[PackedDataLoader, Any]:
    from veomni.data import build_dataloader
    from veomni.from_config import load_datasets, load_tokenizer

    data = config.data
    dataset, _ = load_datasets(config)
    tokenizer = load_tokenizer(config, dataset)
    loader = build_dataloader(
        dataset,
        tokenizer,
        max_seq_len=data.max_seq_len,
        seed=config.train.seed,
        shuffle=data.shuffle,
        packing=data.packing,
        overlong=data.overlong,
        pin_memory=False,
        epochs=1,
        cache_dir=data.cache_dir,
        chat_template=data.chat_template,
    )
    return loader, tokenizer


def _documents(row: Mapping[str, Any], tokenizer: Any) -> Iterator[Text]:
    """Yield a headline and the text of each document of a one-row micro-batch, and how much of the row is padding."""
    from rich.text import Text

    from veomni.batch import IGNORE_INDEX

    ids = row["input_ids"].flatten().tolist()
    learned = [label != IGNORE_INDEX for label in row["labels"].flatten().tolist()]
    starts = [index for index, position in enumerate(row["position_ids"].flatten().tolist()) if position == 0]
    bounds = [*starts, len(ids)]
    for number, (start, end) in enumerate(pairwise(bounds), 1):
        if end == len(ids) and not any(learned[start:]) and len(set(ids[start:])) == 1:
            yield Text(f"padding: {end - start} tokens", style="bold")
        else:
            headline = f"document {number}: {end - start} tokens, {sum(learned[start:end])} learned\n"
            yield Text.assemble((headline, "bold"), coloured(ids[start:end], learned[start:end], tokenizer))
