"""Conversations with media as the model will see them: documents, what became of their media, and how they pack."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veomni.batch.fields import IGNORE_INDEX
from veomni.cli.token_colours import LEGEND, coloured

if TYPE_CHECKING:
    from rich.console import Console

    from veomni.data.multimodal import EncodedDocument, Family, MediaFeatures, MultimodalTransform
    from veomni.data.sources.records import Document
    from veomni.data.sources.schema import RecordSchema
    from veomni.run_config import Config


@dataclass(frozen=True)
class _Counted:
    """What is remembered of a document, whose pixels would soon fill the memory."""

    tokens: int
    supervised: int
    media_tokens: int
    kinds: tuple[str, ...]

    @property
    def holds(self) -> str:
        return " and ".join(dict.fromkeys(self.kinds)) or "text alone"


def show_documents(config: Config, console: Console, shown: int, counted: int) -> dict[str, list[int]]:
    """Print the first documents, and how full rows are if those counted are packed.

    Returns:
        The lengths of documents, by the kinds of media in them.
    """
    from veomni.data.multimodal import SkipBadMedia
    from veomni.data.sources.opened import in_turn

    dataset, _ = config.open_data()
    tokenizer = config.build_tokenizer(dataset)
    media = config.data.media
    transform = media.build_transform(config, tokenizer)
    skipping, skips = SkipBadMedia(media.max_skipped), media.on_bad_media == "skip"
    found: list[_Counted] = []
    for source, document in islice(in_turn(dataset.sources), max(shown, counted)):
        if not source.schema.type.has_media:
            encoded: EncodedDocument | None = _text(document, source.schema, transform)
        else:
            encoded = skipping(transform.encode, document) if skips else transform.encode(document)
        if encoded is None:
            continue
        if len(found) < shown:
            _show(encoded, console, tokenizer, transform.family, source.name if dataset.indexed is None else "")
        found.append(_counted(encoded, transform.family))
    available = f"{len(found)} of {len(dataset.indexed)}" if dataset.indexed else f"{len(found)}"
    _summary(config, console, found, skipping.skipped, available)
    groups: dict[str, list[int]] = {}
    for one in sorted(found, key=lambda one: one.holds):
        groups.setdefault(one.holds, []).append(one.tokens)
    return groups


def _text(document: Document, schema: RecordSchema, transform: MultimodalTransform) -> EncodedDocument:
    from veomni.data.multimodal import EncodedDocument

    [encoded] = schema.type.encode([document], schema, transform.tokenizer, transform.chat_template)
    ids = torch.tensor(encoded.ids)
    weights = torch.ones(len(ids)) if encoded.weights is None else torch.tensor(encoded.weights)
    sample = {"input_ids": ids, "labels": torch.where(weights != 0, ids, IGNORE_INDEX)}
    return EncodedDocument(sample, document.where, [])


def _counted(document: EncodedDocument, family: Family) -> _Counted:
    ids, supervised = _tokens(document)
    media = sum(index in family.unsupervised for index in ids)
    return _Counted(len(ids), sum(supervised), media, tuple(item.kind for item, _ in document.media))


def _show(document: EncodedDocument, console: Console, tokenizer: Any, family: Family, source: str) -> None:
    ids, supervised = _tokens(document)
    console.rule(f"{source}: {document.where}" if source else document.where)
    console.print(f"{len(ids)} tokens, {sum(supervised)} supervised", style="bold")
    seen: Counter[str] = Counter()
    for item, features in document.media:
        seen[item.kind] += 1
        became = _became(features, family)
        console.print(f"{item.kind} {seen[item.kind]}: {features.source} -> {became}", style="cyan")
    console.print(coloured(ids, supervised, tokenizer, family.unsupervised))


def _tokens(document: EncodedDocument) -> tuple[list[int], list[bool]]:
    labels = document.sample["labels"].tolist()
    return document.sample["input_ids"].tolist(), [label != IGNORE_INDEX for label in labels]


def _became(features: MediaFeatures, family: Family) -> str:
    parts = [f"{family.media_tokens(features.text)} tokens"]
    for name, tensor in sorted(features.tensors.items(), key=lambda named: not named[0].endswith("grid_thw")):
        if isinstance(tensor, Tensor) and name.endswith("grid_thw"):
            frames, rows, columns = tensor[0].tolist()
            parts.append(f"patches {columns} wide x {rows} high" + (f" x {frames} in time" if frames > 1 else ""))
        elif name in ("pixel_values", "pixel_values_videos", "input_features"):
            parts.append(f"{name} {list(tensor.shape)}")
    return ", ".join(parts)


def _summary(config: Config, console: Console, found: list[_Counted], skipped: int, available: str) -> None:
    import numpy as np

    from veomni.data.packing.best_fit import best_fit_decreasing
    from veomni.errors import DataError

    if not found:
        raise DataError(f"none of {skipped} documents can be used", "fix their media")
    capacity = config.data.max_seq_len
    lengths = np.array([one.tokens for one in found])
    total, supervised, media = (
        lengths.sum(),
        sum(one.supervised for one in found),
        sum(one.media_tokens for one in found),
    )
    kinds = Counter(kind for one in found for kind in one.kinds)
    fitting = lengths[lengths <= capacity]
    rows = int(best_fit_decreasing(fitting, capacity).max()) + 1 if len(fitting) else 0
    console.rule(f"{available} documents")
    console.print(f"{total} tokens, {100 * supervised / total:.1f} % supervised; {LEGEND}", style="bold")
    recorded = ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))
    console.print(f"media: {recorded or 'none'}; {100 * media / total:.1f} % of tokens stand for them", style="bold")
    if rows:
        filled = 100 * fitting.sum() / (rows * capacity)
        console.print(f"packed: {rows} rows of {capacity} tokens, {filled:.2f} % filled", style="bold")
    for number, what in ((len(lengths) - len(fitting), f"longer than {capacity}"), (skipped, "left out: bad media")):
        if number:
            console.print(f"{number} {what}", style="bold yellow")
