"""``veomni data preview``: what the model will see, in colour, and how long documents are."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; the configuration and its overrides are what is left."""
    parser.usage = "veomni data preview CONFIG.yaml [--section.key VALUE ...] [--rows N] [--documents N] [--plot FILE]"
    parser.add_argument("--rows", type=int, default=2, metavar="N", help="rows to print (default: %(default)s)")
    parser.add_argument(
        "--documents", type=int, default=256, metavar="N",
        help="documents with media, or rows of a stream, that are read to measure lengths (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--plot", metavar="FILE", help="where the histogram goes (default: data_lengths.png in train.output_dir)"
    )


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print what training starts with, and how full rows are; draw the lengths of documents."""
    from rich.console import Console

    from veomni.cli.data_documents import show_documents
    from veomni.cli.data_rows import show_rows
    from veomni.cli.drawing import plot_lengths
    from veomni.run_config import load_config

    config = load_config(rest[1:] if rest[:1] == ["preview"] else rest)
    console = Console(highlight=False, soft_wrap=True)
    show = show_documents if config.data.has_media else show_rows
    groups = show(config, console, arguments.rows, arguments.documents)
    out = Path(arguments.plot or Path(config.train.output_dir) / "data_lengths.png")
    names = ", ".join(source.name for source in config.data.sources) or config.data.train_path
    count = sum(map(len, groups.values()))
    plot_lengths(groups, config.data.max_seq_len, out, f"{count} documents of {names}")
    console.print(f"lengths: {out}", style="bold")
