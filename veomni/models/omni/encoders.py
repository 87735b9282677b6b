"""The encoders of composed models: how the features of each item come out of an encoder of transformers."""

from typing import Any

import torch
from torch import Tensor, nn

from veomni.errors import DataError
from veomni.families.omni import ENCODERS, Encoder
from veomni.models.transformers_api.encoders import encode_padded_audio


def encode_square(encoder: Any, pixel_values: Tensor, sizes: Tensor | None) -> list[Tensor]:
    """Encode images of one size, ``[images, channels, height, width]``."""
    return list(encoder(pixel_values=pixel_values.to(_dtype(encoder))).last_hidden_state)


def encode_square_with_class_token(encoder: Any, pixel_values: Tensor, sizes: Tensor | None) -> list[Tensor]:
    """Encode images of one size, and leave out the token that stands for the whole of each."""
    return [features[1:] for features in encode_square(encoder, pixel_values, sizes)]


def encode_patches(encoder: Any, pixel_values: Tensor, sizes: Tensor | None) -> list[Tensor]:
    """Encode images of any size, given as patches ``[patches, channels]`` with sizes ``[images, 3]``."""
    if sizes is None:
        raise DataError("images given as patches have no image_grid_thw", "give what the processor returns")
    output = encoder(pixel_values.to(_dtype(encoder)), grid_thw=sizes)
    counts = (sizes.prod(-1) // encoder.config.spatial_merge_size**2).tolist()
    return list(output.pooler_output.split(counts))


def encode_audio(encoder: Any, input_features: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Encode mel features ``[clips, mels, frames]`` that are padded to the encoder's span."""
    if mask is None:
        raise DataError("audio has no feature_attention_mask", "give what the processor returns")
    output, counts = encode_padded_audio(encoder, input_features.to(_dtype(encoder)), mask)
    return [clip[:count] for clip, count in zip(output.last_hidden_state, counts.tolist(), strict=True)]


ENCODERS.register("siglip_vision_model")(Encoder(encode_square, "SiglipImageProcessor"))
ENCODERS.register("internvl_vision")(Encoder(encode_square_with_class_token, "CLIPImageProcessor"))
ENCODERS.register("clip_vision_model")(Encoder(encode_square_with_class_token, "CLIPImageProcessor"))
ENCODERS.register("dinov2")(Encoder(encode_square_with_class_token, "BitImageProcessor"))
ENCODERS.register("qwen2_5_vl_vision")(Encoder(encode_patches, "Qwen2VLImageProcessor"))
ENCODERS.register("qwen3_vl_vision")(Encoder(encode_patches, "Qwen2VLImageProcessor"))
ENCODERS.register("qwen2_audio_encoder")(Encoder(encode_audio))


def feature_channels(config: Any) -> int:
    """Return the channels of what an encoder of this configuration gives out."""
    for name in ("out_hidden_size", "d_model", "hidden_size"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    raise ValueError(f"{type(config).__name__} does not say how many channels its features have")


def _dtype(encoder: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in encoder.parameters() if parameter.is_floating_point())


class Projector(nn.Module):
    """From an encoder's channels to the foundation's: a norm, and two layers with GELU between."""

    def __init__(self, channels: int, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.linear_1 = nn.Linear(channels, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """Return ``[..., hidden_size]`` for ``[..., channels]``."""
        projected: Tensor = self.linear_2(nn.functional.gelu(self.linear_1(self.norm(features))))
        return projected
