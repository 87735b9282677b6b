"""``veomni data``: the first packed rows as the model will see them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, groupby, islice, pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

    from veomni.config import Config
    from veomni.data import PackedDataLoader

HELP = "print the first packed rows, decoded, with the tokens that are learned in colour"
TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; the configuration and its overrides are what is left."""
    parser.usage = "veomni data CONFIG.yaml [--section.key VALUE ...] [--rows N]"
    parser.add_argument("--rows", type=int, default=2, metavar="N", help="rows to print (default: %(default)s)")


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print the rows that training starts with, and how full all rows are.

    Raises:
        InputError: the configuration or the data cannot be used.
    """
    from rich.console import Console

    from veomni.config import load_config

    config = load_config(rest)
    loader, tokenizer = _loader(config)
    console = Console(highlight=False, soft_wrap=True)
    micro_batches = chain.from_iterable(loader)
    for number, row in enumerate(islice(micro_batches, arguments.rows), 1):
        console.rule(f"row {number}")
        for part in _documents(row, tokenizer):
            console.print(part)
    filled = f"{len(loader)} rows of {config.data.max_seq_len} tokens, {100 * loader.fill:.2f} % filled"
    console.print(f"{filled}; green is learned, grey is read only", style="bold")


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
            yield Text.assemble((headline, "bold"), _coloured(ids[start:end], learned[start:end], tokenizer))


def _coloured(ids: Sequence[int], learned: Sequence[bool], tokenizer: Any) -> Text:
    from rich.text import Text

    text = Text()
    for is_learned, group in groupby(zip(ids, learned, strict=True), key=lambda item: item[1]):
        decoded = tokenizer.decode([token for token, _ in group], skip_special_tokens=False)
        # Data may hold escape sequences, which a terminal would obey.
        shown = "".join(
            char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in decoded
        )
        text.append(shown, style="green" if is_learned else "bright_black")
    return text
