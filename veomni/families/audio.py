"""Audio encoders that do not treat a clip alone, or place its features in their own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veomni.batch.forward_call import ForwardCall
from veomni.errors import DataError
from veomni.models.adapter.adapter import InputPass, ModelAdapter, Stage
from veomni.models.transformers_api.encoders import padded_audio_lengths
from veomni.models.transformers_api.masks import bidirectional_mask


def merges_audio_in_forward(owner: nn.Module) -> bool:
    """Whether a model encodes and places audio within its forward, as Qwen2-Audio does, and not by a method."""
    return hasattr(owner, "audio_tower") and not hasattr(owner, "get_image_features")


def mask_audio_padding(adapter: ModelAdapter, owner: nn.Module) -> None:
    """Make the features of a clip independent of what else is in the batch, in Qwen3-Omni's encoder.

    It pads all chunks to the longest one, and its convolutions have a bias: the end of a clip shorter than a chunk
    would otherwise depend on whether a longer one shares its micro-batch.
    """
    encoder: Any = getattr(owner, "audio_tower", None)
    if encoder is None or not hasattr(encoder, "conv2d1"):
        return
    ends: list[Tensor] = []  # frames of every chunk of the batch, as if its clip were alone, after each convolution

    def measure(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        frames = kwargs["feature_lens"] if "feature_lens" in kwargs else args[1]
        chunk = 2 * module.n_window
        own = frames.clamp(max=chunk).repeat_interleave(-(-frames // chunk))
        ends[:] = [(own - 1) // 2 + 1, ((own - 1) // 2) // 2 + 1]

    def silence(layer: int) -> Callable[..., Tensor]:
        def apply(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            here, ends[layer] = ends[layer].split([len(output), len(ends[layer]) - len(output)])
            places = torch.arange(output.shape[-1], device=output.device)
            return output.masked_fill((places >= here[:, None])[:, None, None], 0)

        return apply

    adapter.hook(encoder, measure, before=True, with_kwargs=True)
    for layer, convolution in enumerate((encoder.conv2d1, encoder.conv2d2)):
        adapter.hook(convolution, silence(layer))


class EncodeAudio:
    """``get_audio_features`` of Qwen2-Audio: mel features ``[clips, mels, frames]`` to ``[tokens, hidden]``."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __call__(self, input_features: Tensor, feature_attention_mask: Tensor) -> Any:
        """Encode all clips, and keep the features that are not of padding."""
        encoder = self.owner.audio_tower
        frames, features = padded_audio_lengths(encoder, feature_attention_mask)
        places = torch.arange((input_features.shape[-1] - 2) // 2 + 1, device=input_features.device)
        mask = bidirectional_mask(encoder.config, places < frames[:, None], encoder.dtype)
        output = encoder(input_features, attention_mask=mask)
        hidden = self.owner.multi_modal_projector(output.last_hidden_state)
        output.last_hidden_state = hidden[places[: hidden.shape[1]] < features[:, None]]
        return output


class PlaceAudio(InputPass):
    """Gives a model that merges audio in its forward embeddings with the audio in them.

    Its own merge takes a row without two placeholders in succession for one of an older format.
    """

    stage = Stage.MEDIA

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def before(self, call: ForwardCall) -> None:
        """Encode, and replace the arguments of tokens and audio by embeddings."""
        tokens, values = call.kwargs.get("input_ids"), call.kwargs.get("input_features")
        if tokens is None or values is None:
            return
        embeds = self.owner.get_input_embeddings()(tokens)
        output = self.owner.get_audio_features(values, call.kwargs.get("feature_attention_mask"))
        features = output.last_hidden_state
        places = tokens == self.owner.config.audio_token_id
        if int(places.sum()) != len(features):
            raise DataError(
                f"the batch has {int(places.sum())} audio placeholders for {len(features)} audio features",
                "give each audio clip as many placeholder tokens as it has features (its processor does)",
            )
        embeds = embeds.masked_scatter(places.unsqueeze(-1), features.to(embeds.dtype))
        call.kwargs |= dict.fromkeys(("input_ids", "input_features", "feature_attention_mask"))
        call.kwargs["inputs_embeds"] = embeds
