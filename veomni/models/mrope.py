"""Position ids of a document with images, videos and sounds, by the rule of its model family."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veomni.errors import DataError
from veomni.models import hf
from veomni.models.loader import model_class

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_RENAMED = {"second_per_grids": "video_second_per_grid"}


class DocumentPositions:
    """Computes position ids without a model: made from a configuration, cheap to keep in every worker.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self._rule: Any = hf.rope_rule(model_class(config), config)
        self._config = config
        parameters = () if self._rule is None else inspect.signature(self._rule.get_rope_index).parameters
        self._takes = {name: _RENAMED.get(name, name) for name in parameters}

    @property
    def has_axes(self) -> bool:
        """Whether positions have time, height and width; packed ids are then ``[4, batch, seq]``."""
        return self._rule is not None

    def __call__(self, document: Mapping[str, Any]) -> Tensor:
        """Return the positions of one document.

        Args:
            document: Tensors as the family's processor gives them for it alone: ``input_ids`` and, where it has them,
                ``mm_token_type_ids`` ``[seq]``; sizes of its media.

        Returns:
            int64 ``[seq]``, or ``[4, seq]``: the place of each token in the document, which keeps packed documents
            apart, then time, height and width.

        Raises:
            DataError: placeholders and media do not fit together.
        """
        ids: Tensor = document["input_ids"]
        text = torch.arange(len(ids))
        if self._rule is None:
            return text
        given = {name: document[key] for name, key in self._takes.items() if document.get(key) is not None}
        given |= {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
        if "mm_token_type_ids" in self._takes:
            given["mm_token_type_ids"] = self._types(document)[None]
        if "audio_seqlens" in self._takes:
            given["audio_seqlens"] = _frames(document)
        try:
            axes, _ = self._rule.get_rope_index(**{name: given[name] for name in given if name in self._takes})
        except (RuntimeError, IndexError, StopIteration, TypeError, ValueError) as error:
            raise DataError(
                f"the placeholders of a document do not fit its media ({type(error).__name__}: {error})",
                "give every image, video and sound its placeholders, and their sizes, as the processor does",
            ) from error
        return torch.cat([text[None], axes[:, 0].to(text.dtype)])

    def _types(self, document: Mapping[str, Any]) -> Tensor:
        types = document.get("mm_token_type_ids")
        if isinstance(types, Tensor):
            return types
        ids: Tensor = document["input_ids"]
        images, videos = (ids == getattr(self._config, f"{kind}_token_id") for kind in ("image", "video"))
        if document.get("video_grid_thw") is not None and not bool(videos.any()):
            raise DataError(
                "a document with a video has no video placeholder, and no mm_token_type_ids that would tell it",
                "keep the mm_token_type_ids that the processor returns",
            )
        return images.long() + 2 * videos.long()


def _frames(document: Mapping[str, Any]) -> Tensor | None:
    mask, lengths = document.get("feature_attention_mask"), document.get("audio_feature_lengths")
    return lengths if mask is None else mask.sum(-1)
