"""What a stream makes of conversations with media."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from veomni.batch import SOURCE_IDS, PackedInputs
from veomni.data.multimodal.collate import MultimodalCollator
from veomni.data.overlong import refuse_overlong
from veomni.data.records import Document
from veomni.data.samples import Made, Piece, Row, name_documents
from veomni.errors import ConfigError

_GRIDS = ("image_grid_thw", "video_grid_thw")


class MediaSamples:
    """Makes samples of conversations with media, whose records hold them in the field ``messages``.

    Args:
        transform: From a record to a model's inputs; None for a record that is left out.
        collator: Packs them.
        stand_ins: Tokens that stand for media.
        sources: How many sources are mixed.
        overlong: What happens to conversations longer than a row: ``error`` or ``drop``.
        digests: What samples depend on beside the data, by name.

    Raises:
        ConfigError: conversations with media cannot be cut.
    """

    together = 1

    def __init__(
        self,
        transform: Callable[[Document], Mapping[str, Tensor] | None],
        collator: MultimodalCollator,
        *,
        stand_ins: Collection[int],
        sources: int = 1,
        overlong: str = "error",
        digests: Mapping[str, str],
    ) -> None:
        if overlong not in ("error", "drop"):
            raise ConfigError(f"data.overlong {overlong} would cut media apart", "set data.overlong to error or drop")
        self._transform, self._collator, self._stand_ins = transform, collator, torch.tensor(sorted(stand_ins))
        self._sources, self._overlong, self.digests = sources, overlong, digests

    def make(self, documents: Sequence[Document], source: int) -> list[Made]:
        """Read, decode and tokenise records.

        Raises:
            DataError: a record cannot be used, or is too long where that is an error.
        """
        return [self._made(document) for document in documents]

    def _made(self, document: Document) -> Made:
        sample = self._transform(document)
        if sample is None:
            return Made([])
        tokens = len(sample["input_ids"])
        if tokens > self._collator.max_seq_len:
            if self._overlong == "error":
                refuse_overlong(document.where, tokens, self._collator.max_seq_len)
            return Made([])
        content = {name: value.numpy() for name, value in sample.items()}
        media = int(torch.isin(sample["input_ids"], self._stand_ins).sum())
        return Made([Piece(content, (tokens,), media, tokens * tokens + _tower_cost(content, media))])

    def collate(self, rows: Sequence[Row]) -> PackedInputs:
        """Return a micro-batch of rows."""
        packed = [[self._tensors(sample.piece.content, sample.ref.source) for sample in row] for row in rows]
        return name_documents(self._collator(packed), rows)

    def _tensors(self, content: Mapping[str, NDArray[np.generic]], source: int) -> dict[str, Tensor]:
        tensors = {name: torch.from_numpy(value) for name, value in content.items()}
        if self._sources > 1:
            tensors[SOURCE_IDS] = torch.full_like(tensors["input_ids"], source)
        return tensors


def _tower_cost(content: Mapping[str, NDArray[np.generic]], media: int) -> int:
    """Return the squares of the patches of each image and video, where their sizes are said; else of all tokens."""
    grids = [content[name] for name in _GRIDS if name in content]
    if not grids:
        return media * media
    return int(sum((np.prod(grid.astype(np.int64), axis=-1) ** 2).sum() for grid in grids))
