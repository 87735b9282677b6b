"""Images and videos of a model that has one placeholder token for both."""

from typing import Any

import torch
from torch import Tensor

from veomni.batch.forward_call import ForwardCall, current_call
from veomni.errors import DataError
from veomni.models.adapter.adapter import InputPass, Stage


class DistinguishPlaceholders(InputPass):
    """Finds the placeholders of images and of videos by ``mm_token_type_ids``."""

    stage = Stage.MEDIA

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.present = (False, False)

    def before(self, call: ForwardCall) -> None:
        """Keep which media there are."""
        images, videos = (call.kwargs.get(name) is not None for name in ("pixel_values", "pixel_values_videos"))
        self.present = (images, videos)

    def masks(
        self, input_ids: Tensor, inputs_embeds: Tensor, image_features: Any = None, video_features: Any = None
    ) -> Any:
        """Return where images and videos are, bool ``[batch, seq, 1]`` each; in place of ``get_placeholder_mask``."""
        call = current_call()
        types = None if call is None else call.kwargs.get("mm_token_type_ids")
        marked = input_ids == self.owner.config.image_token_id
        if types is not None:
            found = [marked & (types == number) for number in (1, 2)]
        elif all(self.present):
            raise DataError(
                "a batch with images and videos does not say which placeholders are which",
                "give mm_token_type_ids (the processor returns them)",
            )
        else:
            found = [marked if there else torch.zeros_like(marked) for there in self.present]
        for mask, features in zip(found, (image_features, video_features), strict=True):
            if features is not None and int(mask.sum()) != len(features):
                raise DataError(
                    f"the batch has {int(mask.sum())} placeholders for {len(features)} features",
                    "give each image and video as many placeholders as it has features",
                )
        return tuple(mask.unsqueeze(-1) for mask in found)
