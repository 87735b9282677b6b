"""What a stream makes of conversations with media."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from veomni.batch import SOURCE_IDS, PackedInputs
from veomni.data.multimodal.collate import MultimodalCollator
from veomni.data.multimodal.skipping import SkipBadMedia
from veomni.data.multimodal.transform import MultimodalTransform, PlannedDocument, PlannedMedia
from veomni.data.overlong import refuse_overlong
from veomni.data.records import Document
from veomni.data.samples import Made, Piece, Row, Sample, name_documents
from veomni.errors import ConfigError

S = TypeVar("S")
T = TypeVar("T")


class MediaSamples:
    """Makes samples of conversations with media, whose records hold them in the field ``messages``.

    Args:
        transform: From a record to a model's inputs.
        collator: Packs them.
        skipping: Leaves records out whose media cannot be used; None makes them errors.
        sources: How many sources are mixed.
        overlong: What happens to conversations longer than a row: ``error`` or ``drop``.
        digests: What samples depend on beside the data, by name.

    Raises:
        ConfigError: conversations with media cannot be cut.
    """

    together = 1

    def __init__(
        self,
        transform: MultimodalTransform,
        collator: MultimodalCollator,
        *,
        skipping: SkipBadMedia | None = None,
        sources: int = 1,
        overlong: str = "error",
        digests: Mapping[str, str],
    ) -> None:
        if overlong not in ("error", "drop"):
            raise ConfigError(f"data.overlong {overlong} would cut media apart", "set data.overlong to error or drop")
        self._transform, self._collator, self._skipping = transform, collator, skipping
        self._sources, self._overlong, self.digests = sources, overlong, digests

    def make(self, documents: Sequence[Document], source: int) -> list[Made]:
        """Tokenise records, and see how large their media are.

        Raises:
            DataError: a record cannot be used, or is too long where that is an error.
        """
        return [self._made(document) for document in documents]

    def _made(self, document: Document) -> Made:
        planned = self._kept(self._transform.plan, document)
        if planned is None:
            return Made([])
        tokens = len(planned.ids)
        if tokens > self._collator.max_seq_len:
            if self._overlong == "error":
                refuse_overlong(document.where, tokens, self._collator.max_seq_len)
            return Made([])
        seen = [self._transform.family.media_tokens(media.text) for media in planned.media]
        cost = tokens * tokens + sum(self._patches(media) ** 2 for media in planned.media)
        return Made([Piece(planned, (tokens,), sum(seen), cost)])

    def _kept(self, make: Callable[[S], T], given: S) -> T | None:
        return make(given) if self._skipping is None else self._skipping(make, given)

    def _patches(self, media: PlannedMedia) -> int:
        """Return what a tower attends to: the patches of an image or video, as many as the tokens of a sound."""
        family = self._transform.family
        return family.media_tokens(media.text) * (1 if media.item.kind == "audio" else family.patches_per_token)

    def complete(self, sample: Sample) -> Sample | None:
        """Decode a sample's media; None if it is left out for them.

        Raises:
            MediaError: one of them cannot be used, where that is an error.
        """
        planned: PlannedDocument = sample.piece.content
        made = self._kept(self._transform.finish_compactly, planned)
        if made is None:
            return None
        arrays = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in made.items()}
        return replace(sample, piece=sample.piece._replace(content=arrays))

    def collate(self, rows: Sequence[Row]) -> PackedInputs:
        """Return a micro-batch of rows; here pixels are normalised, each written once."""
        packed = [[self._tensors(sample.piece.content, sample.ref.source) for sample in row] for row in rows]
        return name_documents(self._collator(packed), rows)

    def _tensors(self, content: Mapping[str, Any], source: int) -> dict[str, Any]:
        tensors = {
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in content.items()
        }
        if self._sources > 1:
            tensors[SOURCE_IDS] = torch.full_like(tensors["input_ids"], source)
        return tensors
