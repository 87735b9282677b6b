"""Position ids of a document with images, videos and audio, by the rule of its model family."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veomni.errors import DataError
from veomni.models.loader import model_class
from veomni.models.transformers_api.encoders import rope_rule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_RENAMED = {"second_per_grids": "video_second_per_grid"}
_AUDIO_FLAG = "use_audio_in_video"
FRACTIONS = "position_fractions"
"""Fractions of positions, int32 ``[batch, seq, 3]`` in parts of one: integers, which mixed precision does not round."""
FRACTION_PARTS = 1 << 24
"""Parts of one: every fraction of a float32 above 1 is a whole number of them."""


class DocumentPositions:
    """Computes position ids from a model's configuration alone: cheap to keep in every worker."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self._rule: Any = rope_rule(model_class(config), config)
        self._config = config
        parameters = () if self._rule is None else inspect.signature(self._rule.get_rope_index).parameters
        self._takes = {name: _RENAMED.get(name, name) for name in parameters}

    @property
    def has_axes(self) -> bool:
        """Whether positions have time, height and width; packed ids are then ``[4, batch, seq]``."""
        return self._rule is not None

    def __call__(self, document: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the positions of a document, whose tensors are as the family's processor gives them for it alone.

        ``position_ids`` are int64 ``[seq]``, or ``[4, seq]``: the place of each token in the document, which keeps
        packed documents apart, then time, height and width. Where these are no whole numbers (seconds of videos in
        Qwen3-Omni), also :data:`FRACTIONS` ``[seq, 3]``, to be added to the last three. DataError where placeholders
        and media do not fit together.
        """
        ids: Tensor = document["input_ids"]
        text = torch.arange(len(ids))
        if self._rule is None:
            return {"position_ids": text}
        given = {name: document[key] for name, key in self._takes.items() if document.get(key) is not None}
        given["input_ids"] = ids
        if "mm_token_type_ids" in self._takes:
            given["mm_token_type_ids"] = self._types(document)
        if "audio_seqlens" in self._takes:
            mask = document.get("feature_attention_mask")
            given["audio_seqlens"] = document.get("audio_feature_lengths") if mask is None else mask.sum(-1)
        try:
            axes = self._axes(given)
        except (RuntimeError, IndexError, StopIteration, TypeError, ValueError) as error:
            problem = f"the placeholders of a document do not fit its media ({type(error).__name__}: {error})"
            fix = "give every image, video and audio clip its placeholders, and their sizes, as the processor does"
            raise DataError(problem, fix) from error
        whole = axes.floor().to(text.dtype)
        made = {"position_ids": torch.cat([text[None], whole])}
        beyond = ((axes - whole) * FRACTION_PARTS).to(torch.int32).T
        return {**made, FRACTIONS: beyond} if bool(beyond.any()) else made

    def _axes(self, given: Mapping[str, Any]) -> Tensor:
        """Return time, height and width ``[3, seq]``.

        The rule takes one flag for the audio of all videos of a document. Where some have audio and some do not, it is
        applied to each video with what precedes it; each begins behind the largest position before it, as all media do.
        """
        if _AUDIO_FLAG not in self._takes:
            return self._applied(given)
        audible, silent = self._videos(given["input_ids"])
        if not (audible and silent):
            return self._applied({**given, _AUDIO_FLAG: bool(audible)})
        found: list[Tensor] = []
        for piece in self._pieces(given):
            start = found[-1].max() + 1 if found else 0
            found.append(self._applied({**piece, _AUDIO_FLAG: bool(self._videos(piece["input_ids"])[0])}) + start)
        return torch.cat(found, dim=1)

    def _applied(self, given: Mapping[str, Any]) -> Tensor:
        ids = given["input_ids"]
        per_token = {name: given[name][None] for name in ("input_ids", "mm_token_type_ids") if name in given}
        per_token["attention_mask"] = torch.ones_like(ids)[None]
        inputs = {**given, **per_token}
        axes, _ = self._rule.get_rope_index(**{name: inputs[name] for name in inputs if name in self._takes})
        return axes[:, 0]

    def _begins(self, ids: Tensor, *tokens: str) -> list[int]:
        """Return where a vision start is followed by one of the tokens that the configuration calls so."""
        follows = torch.isin(ids[1:], torch.tensor([getattr(self._config, name) for name in tokens]))
        return (follows & (ids[:-1] == self._config.vision_start_token_id)).nonzero().flatten().tolist()

    def _videos(self, ids: Tensor) -> tuple[int, int]:
        """Return the number of videos whose audio is among their tokens, and of the others."""
        return len(self._begins(ids, "audio_start_token_id")), len(self._begins(ids, "video_token_id"))

    def _pieces(self, given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Cut a document behind every video."""
        ids = given["input_ids"]
        videos = self._begins(ids, "video_token_id", "audio_start_token_id")
        ends = (ids == self._config.vision_end_token_id).nonzero().flatten().tolist()
        cuts = [next(end + 1 for end in ends if end > video) for video in videos]
        done = {"image_grid_thw": 0, "video_grid_thw": 0, "second_per_grids": 0, "audio_seqlens": 0}
        for start, stop in pairwise([0, *cuts, len(ids)]):
            piece = ids[start:stop]
            seen = sum(self._videos(piece))
            clips = int((piece == self._config.audio_start_token_id).sum())
            counts = [len(self._begins(piece, "image_token_id")), seen, seen, clips]
            media = {}
            for (name, first), count in zip(list(done.items()), counts, strict=True):
                if count:
                    media[name] = given[name][first : first + count]
                done[name] = first + count
            if len(piece):
                yield {"input_ids": piece, **media}

    def _types(self, document: Mapping[str, Any]) -> Tensor:
        types = document.get("mm_token_type_ids")
        if isinstance(types, Tensor):
            return types
        ids: Tensor = document["input_ids"]
        images, videos = (ids == getattr(self._config, f"{kind}_token_id") for kind in ("image", "video"))
        if document.get("video_grid_thw") is not None and not bool(videos.any()):
            problem = "a document with a video has no video placeholder, and no mm_token_type_ids"
            raise DataError(problem, "keep the mm_token_type_ids that the processor returns")
        return images.long() + 2 * videos.long()
