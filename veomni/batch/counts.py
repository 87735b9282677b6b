"""What the loss of a micro-batch is a mean over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from veomni.batch.fields import IGNORE_INDEX
from veomni.batch.micro_batch import MicroBatch
from veomni.errors import DataError


def supervised_tokens(micro: MicroBatch) -> int:
    """Count the labels that a loss which shifts them by one is taken on; without labels, the rows."""
    if "shift_labels" in micro.inputs:
        return int((micro.inputs["shift_labels"] != IGNORE_INDEX).sum())
    labels = micro.inputs.get("labels")
    if isinstance(labels, Tensor) and labels.dim() > 1:
        return int((labels[..., 1:] != IGNORE_INDEX).sum())
    return row_count(micro)


def token_weight(micro: MicroBatch) -> float:
    """Return the sum of the weights of a micro-batch's supervised tokens; each weighs 1 unless data give weights."""
    if micro.samples == 0:
        return 0
    weights = micro.targets.loss_weights
    if weights is None:
        return supervised_tokens(micro)
    if "shift_labels" in micro.inputs:
        targets = micro.inputs["shift_labels"]
    else:
        targets, weights = micro.inputs["labels"][..., 1:], weights[..., 1:]
    return float(weights[targets != IGNORE_INDEX].sum(dtype=torch.float64))


def label_count(micro: MicroBatch) -> int:
    """Count the labels that a loss which does not shift them is taken on; without labels, the rows."""
    if micro.samples == 0:
        return 0
    labels = micro.inputs.get("shift_labels", micro.inputs.get("labels"))
    if not isinstance(labels, Tensor):
        return row_count(micro)
    if labels.is_floating_point() or labels.is_nested:  # a regression's: a mean over rows
        return row_count(micro)
    return int((labels != IGNORE_INDEX).sum())


def row_count(micro: MicroBatch) -> int:
    """Return the number of rows: what the loader counted, or the length of the first tensor that has one.

    Raises:
        DataError: there is no tensor.
    """
    if micro.samples is not None:
        return micro.samples
    for value in _tensors([*micro.args, *micro.inputs.values()]):
        if value.dim():
            return int(value.size(0))
    raise DataError("the rows of a batch without tensors cannot be counted", "give accumulate(..., weight=function)")


def sources_of(micro_batches: Sequence[MicroBatch]) -> dict[str, tuple[int, int]]:
    """Return, by source of a mixture, how many documents micro-batches have, and tokens.

    Every source is in it, so that ranks agree about the names; it is empty for other data.
    """
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
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())
