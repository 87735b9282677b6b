"""What a stream makes of conversations with media."""

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor
from typing_extensions import override

from veomni.batch.micro_batch import MicroBatch
from veomni.data.multimodal.collate import MultimodalCollator
from veomni.data.multimodal.transform import MultimodalTransform, PlannedDocument
from veomni.data.sources.records import Document
from veomni.data.sources.schema import RecordSchema
from veomni.data.text.on_overflow import raise_overflow
from veomni.data.text.samples import Made, Piece, Row, Sample, SampleMaker, TextSamples, name_documents
from veomni.errors import ConfigError, DataError, MediaError
from veomni.logging import create_logger

logger = create_logger(__name__)

S = TypeVar("S")
T = TypeVar("T")


class SkipBadMedia:
    """Gives None for a record whose media cannot be used, and logs it; a malformed conversation stays an error.

    Args:
        max_skipped: How many records all workers together may leave out before it is an error.
    """

    def __init__(self, max_skipped: Annotated[int, Ge(0)] = 100) -> None:
        self.max_skipped = max_skipped
        self._skipped = multiprocessing.get_context("spawn").Value("q", 0)

    @property
    def skipped(self) -> int:
        """Records left out so far, by all workers."""
        return int(self._skipped.value)

    def __call__(self, make: Callable[[S], T], given: S) -> T | None:
        """Return what is made, or None; DataError where more than ``max_skipped`` records would be left out."""
        try:
            return make(given)
        except MediaError as error:
            with self._skipped.get_lock():
                self._skipped.value += 1
                skipped = self._skipped.value
            if skipped > self.max_skipped:
                problem = f"{skipped} records have media that cannot be used, the last one: {error.problem}"
                raise DataError(problem, "fix them, or raise max_skipped", "SkipBadMedia.max_skipped") from error
            logger.warning("left out record %s of at most %s: %s", skipped, self.max_skipped, error.problem)
            return None


class MediaSamples(SampleMaker):
    """Makes samples of conversations with media, whose records hold them in the field ``messages``.

    Conversations longer than a row are dropped where ``on_overflow`` is ``drop``; media are never cut: the policies
    but ``error`` are a ConfigError, unless they are for ``texts``, which makes samples of the sources without media.
    ``schemas`` are those of all sources; ``skipping`` leaves records out whose media cannot be used.
    """

    def __init__(
        self, transform: MultimodalTransform, collator: MultimodalCollator, schemas: Sequence[RecordSchema],
        on_overflow: str = "error", texts: TextSamples | None = None, skipping: SkipBadMedia | None = None,
    ) -> None:  # fmt: skip
        if on_overflow not in ("error", "drop") and texts is None:
            problem = f"on_overflow {on_overflow} would cut media apart"
            raise ConfigError(problem, "set on_overflow to error or drop", "Packing.on_overflow")
        self._transform, self._collator, self._skipping = transform, collator, skipping
        self._schemas, self._texts, self._drops = schemas, texts, on_overflow == "drop"

    @override
    def make(self, documents: Sequence[Document], source: int) -> list[Made]:
        """Tokenize records, and look how large their media are (DataError: unusable, or too long)."""
        if self._texts is not None and not self._schemas[source].type.has_media:
            return self._texts.make(documents, source)
        return [self._made(document) for document in documents]

    def _made(self, document: Document) -> Made:
        planned = self._kept(self._transform.plan, document)
        if planned is None:
            return Made([])
        tokens = len(planned.tokens)
        if tokens > self._collator.max_seq_len:
            if not self._drops:
                raise_overflow(document.where, tokens, self._collator.max_seq_len, policies="drop")
            return Made([])
        family = self._transform.family
        seen = [(family.media_tokens(media.text), media.item.kind) for media in planned.media]
        # A tower attends to the patches of an image or video, and to as many as the tokens of an audio clip.
        patches = [count * (1 if kind == "audio" else family.patches_per_token) for count, kind in seen]
        cost = tokens * tokens + sum(count * count for count in patches)
        return Made([Piece(planned, (tokens,), sum(count for count, _ in seen), cost)])

    def _kept(self, make: Callable[[S], T], given: S) -> T | None:
        return make(given) if self._skipping is None else self._skipping(make, given)

    @override
    def complete(self, sample: Sample) -> Sample | None:
        """Decode a sample's media; None if it is left out for them."""
        planned = sample.content
        if not isinstance(planned, PlannedDocument):  # a text
            return sample
        transform = self._transform
        made = self._kept(lambda one: transform.sample(one.tokens, transform.decode(one).media), planned)
        if made is None:
            return None
        arrays = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in made.items()}
        return replace(sample, content=arrays)

    @override
    def collate(self, rows: Sequence[Row]) -> MicroBatch:
        """Return a micro-batch of rows; here pixels are normalized, each written once."""
        packed = [[document for sample in row for document in self._documents(sample)] for row in rows]
        return name_documents(self._collator(packed), rows)

    def _documents(self, sample: Sample) -> list[dict[str, Any]]:
        if self._schemas[sample.ref.source].type.has_media:
            content = sample.content.items()
            found = [{name: torch.from_numpy(one) if isinstance(one, np.ndarray) else one for name, one in content}]
        else:
            found = [self._transform.sample(tokens) for tokens in sample.content]
        if len(self._schemas) > 1:
            for document in found:
                document["source_ids"] = torch.full_like(document["input_ids"], sample.ref.source)
        return found
