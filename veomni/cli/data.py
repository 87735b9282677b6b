"""``veomni data preview``: what the model will see, in colour, and how long documents are."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from veomni.cli.data_documents import show_documents
from veomni.cli.data_rows import show_rows
from veomni.cli.drawing import plot_lengths
from veomni.run_config import load_config


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print what training starts with, and how full rows are; draw the lengths of documents."""
    config = load_config(rest[1:] if rest[:1] == ["preview"] else rest)
    console = Console(highlight=False, soft_wrap=True)
    show = show_documents if config.data.has_media else show_rows
    groups = show(config, console, arguments.rows, arguments.documents)
    out = Path(arguments.plot or Path(config.train.output_dir) / "data_lengths.png")
    names = ", ".join(source.name for source in config.data.sources) or config.data.train_path
    count = sum(map(len, groups.values()))
    plot_lengths(groups, config.data.max_seq_len, out, f"{count} documents of {names}")
    console.print(f"lengths: {out}", style="bold")
