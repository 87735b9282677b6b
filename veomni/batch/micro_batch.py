"""What flows from a loader through the launcher into a model: micro-batches of one optimizer step.

A loader yields, for every optimizer step, the list of this data rank's micro-batches. A micro-batch is a dict of CPU
tensors in transformers' argument names; a packed text micro-batch holds

- ``input_ids``, ``labels``, ``position_ids``: int64 ``[batch, seq]``; positions restart at 0 with every document;
  labels are unshifted, ``IGNORE_INDEX`` where nothing is learned and at the first token of every document;
- ``cu_seq_lens_q``, ``cu_seq_lens_k``: int32 ``[documents + 1]``, offsets into the ``batch * seq`` flattened tokens,
  the padded tail of a row being one more document;
- ``max_length_q``, ``max_length_k``: int, an upper bound of the longest document.

A micro-batch whose rows are exactly one document each leaves the last four out: dense kernels are faster then.

Where several ranks share a row (``veomni/batch/split.py``), the first three hold this rank's part of it, and
``shift_labels``, already shifted on the whole row, is what the loss is taken on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""The label that no loss is taken on (transformers' convention)."""

SOURCE_IDS = "source_ids"
"""The key under which a mixture's micro-batch holds the source of every token, int64 ``[batch, seq]``, -1 in padding.

It is aligned with the shifted labels as well, since no document learns its first token. Models never see it."""

LOSS_WEIGHTS = "loss_weights"
"""The key under which a micro-batch holds what the loss of every token weighs, float32 ``[batch, seq]``.

It is aligned with ``shift_labels`` where there are any, else with ``labels``; where those are ``IGNORE_INDEX`` it is
not read, and is 1 in padding. A micro-batch without it weighs every supervised token 1. Models never see it."""

SEQUENCE_SIZE = "sequence_parallel_size"
"""The key by which a micro-batch of row parts says how many ranks share its rows; models never see it."""


class PackedInputs(dict[str, Any]):
    """A micro-batch that knows its documents.

    Attributes:
        document_lengths: Tokens of each document in it, without padding; what throughput and FLOPs are counted from.
        row_lengths: Tokens of each row before its padded tail; None where that was not said.
        row_digest: Tells the whole rows apart that this is a part of; 0 for a batch of whole rows.
        document_ids: Of a stream, epoch and place of each document: ``"0/train.jsonl, byte 0"``. Of a document in
            pieces, the piece is part of it; of a preference pair, which side it is.
        document_sources: Of a mixture, the index in ``source_names`` of each document's source.
        source_names: Names of the mixture's sources, the same in every batch.
    """

    document_lengths: tuple[int, ...] = ()
    row_lengths: tuple[int, ...] | None = None
    row_digest: int = 0
    document_ids: tuple[str, ...] = ()
    document_sources: tuple[int, ...] = ()
    source_names: tuple[str, ...] = ()

    def like(self, other: PackedInputs) -> PackedInputs:
        """Take over what ``other`` knows of its documents, and return this batch."""
        self.__dict__.update(other.__dict__)
        return self


def document_lengths(inputs: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the lengths of a micro-batch's documents; of one that does not know them, every row is one document."""
    if isinstance(inputs, PackedInputs):
        return inputs.document_lengths
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return tuple(int(length) for length in mask.bool().sum(-1))
    ids = inputs.get("input_ids")
    if ids is None and inputs.get("inputs_embeds") is not None:
        ids = inputs["inputs_embeds"][..., 0]
    return () if ids is None else (int(ids.shape[-1]),) * (ids.numel() // int(ids.shape[-1]))


def sources_of(micro_batches: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Return, by source, how many documents micro-batches have, and tokens; of no mixture, nothing.

    Every known source is in it, so that ranks agree about the names.
    """
    packed = [micro for micro in micro_batches if isinstance(micro, PackedInputs)]
    names = packed[0].source_names if packed else ()
    found = [[0, 0] for _ in names]
    for micro in packed:
        for source, length in zip(micro.document_sources, micro.document_lengths, strict=False):
            found[source][0] += 1
            found[source][1] += length
    return {name: (count, tokens) for name, (count, tokens) in zip(names, found, strict=True)}


def supervised_tokens(inputs: Mapping[str, Any]) -> int:
    """Count the labels of a micro-batch that a loss is taken on, after the shift by one.

    A batch without ``labels`` counts its rows instead: the mean is then over samples.
    """
    if "shift_labels" in inputs:
        return int((inputs["shift_labels"] != IGNORE_INDEX).sum())
    if "labels" in inputs:
        return int((inputs["labels"][..., 1:] != IGNORE_INDEX).sum())
    first = next((value for value in inputs.values() if isinstance(value, Tensor)), None)
    return 0 if first is None else int(first.shape[0])


def loss_weight(inputs: Mapping[str, Any]) -> float:
    """Return what a micro-batch's loss weighs in the step's: its supervised tokens, or the sum of their weights."""
    if LOSS_WEIGHTS not in inputs:
        return supervised_tokens(inputs)
    if "shift_labels" in inputs:
        targets, weights = inputs["shift_labels"], inputs[LOSS_WEIGHTS]
    else:
        targets, weights = inputs["labels"][..., 1:], inputs[LOSS_WEIGHTS][..., 1:]
    return float(weights[targets != IGNORE_INDEX].sum(dtype=torch.float64))


@dataclass
class MicroBatch:
    """One forward and backward: what to give the model, and how much its loss weighs.

    Attributes:
        inputs: The model's keyword arguments, on the device.
        loss_weight: What its loss is a mean over: supervised tokens of this micro-batch on this rank, each as often as
            it weighs.
        last: Whether gradients are synchronised in this micro-batch's backward.
        part_tokens: By part of a composed model, the tokens that its own loss is the mean of.
    """

    inputs: dict[str, Any]
    loss_weight: float
    last: bool = True
    part_tokens: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StepWork:
    """How much a step computes.

    Attributes:
        tokens: Tokens without padding, supervised or not.
        flops_causal: FLOPs with causal attention counted as such; 0 when they are not known.
        flops_full: FLOPs with attention counted as the whole square.
    """

    tokens: float = 0.0
    flops_causal: float = 0.0
    flops_full: float = 0.0


@dataclass
class StepBatch:
    """All micro-batches of one optimizer step on this rank, and what the ranks agreed about them.

    Attributes:
        micro_batches: This rank's share, on the CPU.
        loss_weight: The sum of its micro-batches' ``loss_weight`` over all ranks.
        work: Everything computed in the step over all ranks.
        index: The optimizer step, counted from 1 over the whole run.
        loss: This rank's share of the global token mean, summed by ``Launcher.backward``; a 0-d tensor on the device.
        part_tokens: By part of a composed model, the tokens of the step over all ranks that its loss is the mean of.
        losses: This rank's share of each part's global mean, where ``Launcher.backward`` was given losses by part.
        source_sums: Of a mixture, the summed losses of this rank's supervised tokens, each times its weight, and summed
            weights, by source; ``[2, sources]`` on the device; None where the model takes its loss by itself.
    """

    micro_batches: Sequence[Mapping[str, Any]]
    loss_weight: float
    work: StepWork
    index: int
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    part_tokens: Mapping[str, int] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)
    source_sums: Tensor | None = None
