"""Documents with media into packed micro-batches, key by key as ``veomni/batch/fields.py`` says."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veomni.batch.documents import RowLayout
from veomni.batch.fields import FIELDS, IGNORE_INDEX, Field
from veomni.batch.micro_batch import MicroBatch
from veomni.batch.split import WHOLE_ROWS, SequenceShard
from veomni.data.multimodal.pixels import PixelList, as_tensor
from veomni.data.packing.rows import segment_offsets
from veomni.errors import DataError
from veomni.families.mrope import DocumentPositions
from veomni.families.omni import DECODERS
from veomni.models.loader import model_class
from veomni.models.transformers_api.encoders import vision_inputs
from veomni.registry import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Sample = Mapping[str, Any]
"""One document as a processor gives it, without a batch axis for what has an entry per token."""

_FOR_POSITIONS = ("mm_token_type_ids", "second_per_grid_ts", "video_second_per_grid", "audio_feature_lengths")
_OF_AN_EMPTY_BATCH = ("input_ids", "labels", "position_ids")
_FLAGS = ("use_audio_in_video", "noise_seed")


class MultimodalCollator:
    """Packs documents into rows: what a loader's worker calls with the documents of its micro-batch.

    Position ids are computed here, per document; so are the boundaries of images, which the vision encoder would
    otherwise read from the accelerator. ``shard`` says which positions of the rows are given out.
    """

    def __init__(
        self, config: PreTrainedConfig, *, max_seq_len: int, pad_token_id: int = 0, shard: SequenceShard = WHOLE_ROWS
    ) -> None:
        self.config, self.max_seq_len, self.pad_token_id, self.shard = config, max_seq_len, pad_token_id, shard
        self.positions = DocumentPositions(config)
        self._decoders = [DECODERS.get(name) for name in getattr(config, "decoders", {})]
        self._taken = frozenset(inspect.signature(model_class(config).forward).parameters)

    def __call__(self, rows: Sequence[Sequence[Sample]]) -> MicroBatch:
        """Return a micro-batch of the documents of each row; DataError for a row too long or a key without a rule."""
        documents = [[self._prepared(sample) for sample in row] for row in rows]
        lengths = [[len(sample["input_ids"]) for sample in row] for row in documents]
        longest = max((sum(row) for row in lengths), default=0)
        if longest > self.max_seq_len:
            problem = f"the documents of a row have {longest} tokens, and a row {self.max_seq_len}"
            raise DataError(problem, "pack fewer documents into it, or raise max_seq_len", "Packing.max_seq_len")
        batch: dict[str, Any] = {}
        keys = dict.fromkeys(key for row in documents for sample in row for key in sample)
        for key in keys or dict.fromkeys(_OF_AN_EMPTY_BATCH):
            rule = _rule(key)
            if rule.per == "token":
                batch[key] = self._pack_tokens(key, rule, documents)
            else:
                batch[key] = as_tensor(join_items([one[key] for row in documents for one in row if key in one], rule))
        if self.shard.size == 1:  # ranks that share rows share their images too, and each encodes others
            batch.update(vision_inputs(self.config, batch))
        segments = [length for row in lengths for length in (*row, self.max_seq_len - sum(row)) if length]
        if len(segments) != len(lengths):  # otherwise nothing is to be kept apart: attention may take a dense kernel
            batch |= segment_offsets(segments, self.max_seq_len)
        layout = RowLayout(tuple(length for row in lengths for length in row), tuple(sum(row) for row in lengths))
        return MicroBatch.of_fields(batch, layout).split(self.shard)

    def _prepared(self, sample: Sample) -> dict[str, Any]:
        if sample.get("input_ids") is None:
            raise DataError("a document has no input_ids", "tokenize it first")
        kept = {key: value for key, value in sample.items() if value is not None and key not in _FLAGS}
        kept |= self.positions(sample)
        for decoder in self._decoders:
            if decoder.keys[0] in kept:
                kept |= decoder.document({**kept, **{flag: sample.get(flag) for flag in _FLAGS}})
        if "labels" in kept:
            kept["labels"] = kept["labels"].clone()
            kept["labels"][:1] = IGNORE_INDEX  # it would be predicted from the document before
        return {key: value for key, value in kept.items() if key not in _FOR_POSITIONS or key in self._taken}

    def _pack_tokens(self, key: str, rule: Field, rows: Sequence[Sequence[Sample]]) -> Tensor:
        """Return ``[batch, seq, ...]``; positions ``[batch, seq]``, or ``[4, batch, seq]`` with text first."""
        axes = (4,) if key == "position_ids" and self.positions.has_axes else ()
        given = (sample[key].movedim(rule.dim, 0) for row in rows for sample in row if key in sample)
        like = next(given, torch.zeros(0, *axes, dtype=torch.int64))
        packed = like.new_full((len(rows), self.max_seq_len, *like.shape[1:]), rule.pad)
        for number, row in enumerate(rows):
            start = 0
            for sample in row:
                stop = start + len(sample["input_ids"])
                if key in sample:
                    packed[number, start:stop] = sample[key].movedim(rule.dim, 0)
                start = stop
            if key == "position_ids":  # the tail is one more document
                packed[number, start:] = torch.arange(self.max_seq_len - start).view(-1, *[1] * len(axes))
            elif key == "input_ids":
                packed[number, start:] = self.pad_token_id
        return packed.movedim(-1, 0) if axes else packed


def join_items(values: Sequence[Tensor | PixelList], rule: Field) -> Tensor | PixelList:
    """Return images, sizes or audio clips of several documents one after another; 8-bit pixels stay what they are."""
    if all(isinstance(value, PixelList) for value in values):
        return PixelList(pixels for value in values for pixels in value)
    tensors = [as_tensor(value) for value in values]
    if rule.ragged:
        longest = max(tensor.shape[-1] for tensor in tensors)
        tensors = [F.pad(tensor, (0, longest - tensor.shape[-1]), value=rule.pad) for tensor in tensors]
    return torch.cat(tensors, dim=rule.dim)


def _rule(key: str) -> Field:
    if key not in FIELDS:
        fix = f"register it in veomni.batch.fields.FIELDS, or leave it out; {did_you_mean(key, list(FIELDS))}"
        raise DataError(f"no packing rule for field {key!r} of a document", fix)
    return FIELDS.get(key)
