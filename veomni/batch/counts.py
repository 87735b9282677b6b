"""What the loss of a micro-batch is a mean over."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from veomni.batch.fields import IGNORE_INDEX
from veomni.batch.micro_batch import MicroBatch
from veomni.errors import DataError


def supervised_tokens(micro: MicroBatch) -> int:
    """Count the labels that a loss which shifts them by one is taken on; without labels, the rows."""
    targets = _targets(micro)
    return row_count(micro) if targets is None else int((targets != IGNORE_INDEX).sum())


def token_weight(micro: MicroBatch) -> float:
    """Return the sum of the weights of a micro-batch's supervised tokens; each weighs 1 unless data give weights."""
    weights, targets = micro.targets.loss_weights, _targets(micro)
    if micro.samples == 0:
        return 0
    if weights is None or targets is None:
        return supervised_tokens(micro)
    weights = weights if "shift_labels" in micro.inputs else weights[..., 1:]
    return float(weights[targets != IGNORE_INDEX].sum(dtype=torch.float64))


def _targets(micro: MicroBatch) -> Tensor | None:
    """Return the label that is predicted at each position; None without labels of sequences."""
    if "shift_labels" in micro.inputs:
        return micro.inputs["shift_labels"]
    labels = micro.inputs.get("labels")
    return labels[..., 1:] if isinstance(labels, Tensor) and labels.dim() > 1 else None


def label_count(micro: MicroBatch) -> int:
    """Count the labels that a loss which does not shift them is taken on; without labels, the rows."""
    if micro.samples == 0:
        return 0
    labels = micro.inputs.get("shift_labels", micro.inputs.get("labels"))
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_nested:
        return row_count(micro)  # a regression's loss is a mean over rows
    return int((labels != IGNORE_INDEX).sum())


def row_count(micro: MicroBatch) -> int:
    """Return the number of rows: what the loader counted, or the length of the first tensor; else a DataError."""
    if micro.samples is not None:
        return micro.samples
    for value in _tensors([*micro.args, *micro.inputs.values()]):
        if value.dim():
            return int(value.size(0))
    raise DataError("the rows of a batch without tensors cannot be counted", "give accumulate(..., weight=function)")


def sources_of(micro_batches: Sequence[MicroBatch]) -> dict[str, tuple[int, int]]:
    """Return documents and tokens of micro-batches by source of a mixture, for all its sources; empty without one."""
    names = micro_batches[0].origin.source_names if micro_batches else ()
    found = [[0, 0] for _ in names]
    for micro in micro_batches:
        for source, length in zip(micro.origin.document_sources, micro.rows.document_lengths, strict=False):
            found[source][0] += 1
            found[source][1] += length
    return {name: (count, tokens) for name, (count, tokens) in zip(names, found, strict=True)}


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple, Mapping)):
            yield from _tensors(value.values() if isinstance(value, Mapping) else value)
