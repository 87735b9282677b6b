"""Conversations with media as the model will see them: documents, what became of their media, and how they pack."""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console

from veomni.cli.drawing import LEGEND, coloured
from veomni.data.multimodal import Family, MediaFeatures, MultimodalTransform, PlannedDocument, SkipBadMedia
from veomni.data.packing.best_fit import best_fit_decreasing
from veomni.data.sources.dataset import in_turn
from veomni.data.sources.records import Document
from veomni.data.sources.schema import RecordSchema
from veomni.data.text.tokens import Tokens
from veomni.errors import DataError
from veomni.run_config import Config


class _Counted(NamedTuple):
    """What is kept of a document, whose pixels would soon fill the memory."""

    tokens: int
    supervised: int
    media_tokens: int
    kinds: tuple[str, ...]


def show_documents(config: Config, console: Console, shown: int, counted: int) -> dict[str, list[int]]:
    """Print the first documents, and how full rows are if those counted are packed; return lengths by their media."""
    dataset, _ = config.open_data()
    tokenizer = config.build_tokenizer(dataset)
    media = config.data.media
    transform = media.build_transform(config, tokenizer)
    skipping, skips = SkipBadMedia(media.max_skipped), media.on_bad_media == "skip"
    found: list[_Counted] = []
    for source, document in islice(in_turn(dataset.sources), max(shown, counted)):
        encode = partial(_encoded, source.schema, transform)
        encoded = skipping(encode, document) if skips else encode(document)
        if encoded is None:
            continue
        ids, supervised = encoded.tokens.ids.tolist(), encoded.tokens.supervised.tolist()
        if len(found) < shown:
            console.rule(f"{source.name}: {encoded.where}" if dataset.indexed is None else encoded.where)
            console.print(f"{len(ids)} tokens, {sum(supervised)} supervised", style="bold")
            _show_media(encoded, console, transform.family)
            console.print(coloured(ids, supervised, tokenizer, transform.family.unsupervised))
        media_tokens = sum(index in transform.family.unsupervised for index in ids)
        kinds = tuple(one.item.kind for one in encoded.media)
        found.append(_Counted(len(ids), sum(supervised), media_tokens, kinds))
    available = f"{len(found)} of {len(dataset.indexed)}" if dataset.indexed else f"{len(found)}"
    _summarize(console, found, config.data.max_seq_len, skipping.skipped, available)
    groups: dict[str, list[int]] = {}
    for one in found:
        groups.setdefault(" and ".join(dict.fromkeys(one.kinds)) or "text alone", []).append(one.tokens)
    return dict(sorted(groups.items()))


def _encoded(schema: RecordSchema, transform: MultimodalTransform, document: Document) -> PlannedDocument:
    if schema.type.has_media:
        return transform.decode(transform.plan(document))
    [documents] = schema.type.encode([document], schema, transform.tokenizer, transform.chat_template)
    ids = np.concatenate([one.ids for one in documents])
    return PlannedDocument(Tokens(ids, np.concatenate([one.supervised for one in documents])), document.where, [])


def _show_media(document: PlannedDocument, console: Console, family: Family) -> None:
    seen: Counter[str] = Counter()
    for one in document.media:
        if one.features is not None:
            kind, became = one.item.kind, ", ".join(_became(one.features, family))
            seen[kind] += 1
            console.print(f"{kind} {seen[kind]}: {one.features.source} -> {became}", style="cyan")


def _became(features: MediaFeatures, family: Family) -> list[str]:
    tensors: Mapping[str, Any] = features.tensors
    parts = [f"{family.media_tokens(features.text)} tokens"]
    for name in tensors:
        if name.endswith("grid_thw") and isinstance(tensors[name], torch.Tensor):
            frames, rows, columns = tensors[name][0].tolist()
            parts.append(f"patches {columns} wide x {rows} high" + (f" x {frames} in time" if frames > 1 else ""))
    shaped = ("pixel_values", "pixel_values_videos", "input_features")
    return parts + [f"{name} {list(tensors[name].shape)}" for name in shaped if name in tensors]


def _summarize(console: Console, found: list[_Counted], capacity: int, skipped: int, available: str) -> None:
    if not found:
        raise DataError(f"none of {skipped} documents can be used", "fix their media")
    lengths = np.array([one.tokens for one in found])
    total, supervised, media = (sum(counts) for counts in list(zip(*found, strict=True))[:3])
    kinds = Counter(kind for one in found for kind in one.kinds)
    recorded = ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))
    console.rule(f"{available} documents")
    console.print(f"{total} tokens, {100 * supervised / total:.1f} % supervised; {LEGEND}", style="bold")
    console.print(f"media: {recorded or 'none'}; {100 * media / total:.1f} % of tokens stand for them", style="bold")
    fitting = lengths[lengths <= capacity]
    if len(fitting):
        rows = int(best_fit_decreasing(fitting, capacity).max()) + 1
        filled = 100 * fitting.sum() / (rows * capacity)
        console.print(f"packed: {rows} rows of {capacity} tokens, {filled:.2f} % filled", style="bold")
    for number, what in ((len(lengths) - len(fitting), f"longer than {capacity}"), (skipped, "left out: bad media")):
        if number:
            console.print(f"{number} {what}", style="bold yellow")
