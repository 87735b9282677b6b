"""Encoders that families treat in their own way: audio padding and placement, parameters that no forward reads."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veomni.batch.forward_call import ForwardCall
from veomni.errors import DataError
from veomni.families.record import family_record
from veomni.models.adapter.adapter import InputPass, ModelAdapter, Stage
from veomni.models.transformers_api.encoders import encode_padded_audio

_HEADS = (
    "vision_tower.head.", "vision_tower.vision_model.head.", "image_encoder.head.", "image_encoder.vision_model.head.",
)  # fmt: skip


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


def encode_audio(owner: Any, input_features: Tensor, feature_attention_mask: Tensor) -> Any:
    """Do what ``get_audio_features`` does in other models: ``[clips, mels, frames]`` to features of tokens."""
    encoder = owner.audio_tower
    output, features = encode_padded_audio(encoder, input_features.to(encoder.dtype), feature_attention_mask)
    hidden = owner.multi_modal_projector(output.last_hidden_state)
    places = torch.arange(hidden.shape[1], device=hidden.device)
    output.last_hidden_state = hidden[places < features[:, None]]
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
            problem = f"the batch has {int(places.sum())} audio placeholders for {len(features)} audio features"
            fix = "give each audio clip as many placeholder tokens as it has features (its processor does)"
            raise DataError(problem, fix)
        embeds = embeds.masked_scatter(places.unsqueeze(-1), features.to(embeds.dtype))
        call.kwargs |= dict.fromkeys(("input_ids", "input_features", "feature_attention_mask"))
        call.kwargs["inputs_embeds"] = embeds


def unread_parameters(owner: Any) -> list[nn.Parameter]:
    """Return the parameters of encoders that no forward reads.

    They are the layers after the one whose features are taken (LLaVA takes the last but one), heads of encoders whose
    output is not used, and what a family keeps for its checkpoints alone.
    """
    family = family_record(owner.config)
    names = (*_HEADS, *family.unread)
    found = [parameter for name, parameter in owner.named_parameters() if any(part in name for part in names)]
    encoder: Any = getattr(owner, "image_encoder", None)
    if getattr(encoder, "config", None) is not None:  # of a composed model
        return found + (_post_norm(encoder) if encoder.config.model_type == "clip_vision_model" else [])
    layer = getattr(owner.config, "vision_feature_layer", None)
    tower = getattr(owner, "vision_tower", None)
    if tower is None or layer is None or (family.after_last_norm and layer == -1):
        return found
    layers = next(child for child in tower.modules() if isinstance(child, nn.ModuleList))
    taken = {index % (len(layers) + 1) for index in (layer if isinstance(layer, list | tuple) else [layer])}
    return [*found, *layers[max(taken) :].parameters(), *_post_norm(tower)]


def _post_norm(encoder: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in encoder.named_parameters() if "post_layernorm" in name]
