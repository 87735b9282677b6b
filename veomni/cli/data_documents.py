"""Conversations with media as the model will see them: documents, what became of their media, and how they pack."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING, Any

from veomni.cli.token_colours import LEGEND, coloured

if TYPE_CHECKING:
    from rich.console import Console

    from veomni.config import Config
    from veomni.data.multimodal import EncodedDocument, MediaFeatures


def show_documents(config: Config, console: Console, shown: int, counted: int) -> list[int]:
    """Print the first documents, and how full rows are if those counted are packed; return their lengths."""
    from veomni.data import TextDataset
    from veomni.data.multimodal import SkipBadMedia
    from veomni.from_config import load_datasets, load_media_transform, load_tokenizer

    dataset, _ = load_datasets(config)
    tokenizer = load_tokenizer(config, dataset)
    transform, media = load_media_transform(config, tokenizer), config.data.media
    skipping = SkipBadMedia(media.max_skipped)
    skips = media.on_bad_media == "skip"
    made = (
        skipping(transform.encode, document) if skips else transform.encode(document)
        for document in islice(dataset, max(shown, counted))
    )  # fmt: skip
    documents = [document for document in made if document is not None]
    for document in documents[:shown]:
        _show(document, console, tokenizer, transform.family.unlearned)
    available = f"{len(documents)} of {len(dataset)}" if isinstance(dataset, TextDataset) else f"{len(documents)}"
    return _summary(config, console, documents, skipping.skipped, available)


def _show(document: EncodedDocument, console: Console, tokenizer: Any, stand_ins: frozenset[int]) -> None:
    ids, learned = _tokens(document)
    console.rule(document.where)
    console.print(f"{len(ids)} tokens, {sum(learned)} learned", style="bold")
    seen: Counter[str] = Counter()
    for item, features in document.media:
        seen[item.kind] += 1
        console.print(f"{item.kind} {seen[item.kind]}: {features.source} -> {_became(features)}", style="cyan")
    console.print(coloured(ids, learned, tokenizer, stand_ins))


def _tokens(document: EncodedDocument) -> tuple[list[int], list[bool]]:
    from veomni.batch import IGNORE_INDEX

    labels = document.sample["labels"].tolist()
    return document.sample["input_ids"].tolist(), [label != IGNORE_INDEX for label in labels]


def _became(features: MediaFeatures) -> str:
    parts = []
    for name, tensor in sorted(features.tensors.items()):
        if name.endswith("grid_thw"):
            parts.append("{} x {} x {} patches".format(*tensor[0].tolist()))
        elif name in ("pixel_values", "pixel_values_videos", "input_features"):
            parts.append(f"{name} {list(tensor.shape)}")
    return ", ".join(parts)


def _summary(
    config: Config, console: Console, documents: list[EncodedDocument], skipped: int, available: str
) -> list[int]:
    import numpy as np

    from veomni.data.packing import best_fit_decreasing
    from veomni.errors import DataError

    if not documents:
        raise DataError(f"none of {skipped} documents can be used", "mend their media")
    capacity = config.data.max_seq_len
    lengths = np.array([len(document.sample["input_ids"]) for document in documents])
    learned = sum(sum(_tokens(document)[1]) for document in documents)
    fitting = lengths[lengths <= capacity]
    rows = int(best_fit_decreasing(fitting, capacity).max()) + 1 if len(fitting) else 0
    console.rule(f"{available} documents")
    console.print(f"{lengths.sum()} tokens, {100 * learned / lengths.sum():.1f} % learned; {LEGEND}", style="bold")
    if rows:
        filled = 100 * fitting.sum() / (rows * capacity)
        console.print(f"packed: {rows} rows of {capacity} tokens, {filled:.2f} % filled", style="bold")
    for number, what in ((len(lengths) - len(fitting), f"longer than {capacity}"), (skipped, "left out: bad media")):
        if number:
            console.print(f"{number} {what}", style="bold yellow")
    return lengths.tolist()
