"""Where the towers of one model family differ from those of another. Everything here is asked of the instance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veomni.errors import DataError
from veomni.models.transformers_api.encoders import audio_lengths, padded_audio_lengths
from veomni.models.transformers_api.masks import bidirectional_mask

_FAMILY_OF_ONE_TOKEN = ("glm4v", "glm4v_moe")
_UNREAD = (
    "audio_bos_eos_token.", "vision_tower.head.", "vision_tower.vision_model.head.",
    "image_encoder.head.", "image_encoder.vision_model.head.",
)  # fmt: skip


def shares_placeholders(owner: Any) -> bool:
    """Whether images and videos have the same placeholder token, as in GLM-4V."""
    return owner.config.model_type in _FAMILY_OF_ONE_TOKEN


def merges_audio_itself(owner: nn.Module) -> bool:
    """Whether a model encodes and places sounds within its forward, as Qwen2-Audio does, and not by a method."""
    return hasattr(owner, "audio_tower") and not hasattr(owner, "get_image_features")


def takes_padded_audio(owner: Any) -> bool:
    """Whether mel features are padded to the span of the encoder, 30 seconds in Whisper's family."""
    return owner.config.audio_config.model_type == "qwen2_audio_encoder"


def audio_counts(owner: Any) -> Callable[[Tensor], Tensor] | None:
    """Return the function from frames ``[clips]`` to the features of each clip; None where it is unknown."""
    lengths = audio_lengths(owner.audio_tower)
    return None if lengths is None else lambda frames: lengths(frames)[1]


def unread_parameters(owner: Any) -> list[nn.Parameter]:
    """Return the tower parameters that no forward reads.

    They are the layers after the one whose features are taken (LLaVA takes the last but one), heads of towers that
    nothing comes out of, and an embedding that Qwen2.5-Omni keeps for its checkpoints.
    """
    found = [parameter for name, parameter in owner.named_parameters() if any(part in name for part in _UNREAD)]
    if getattr(getattr(owner, "image_encoder", None), "config", None) is not None:
        kind = owner.image_encoder.config.model_type
        named = owner.image_encoder.named_parameters()
        return found + [part for name, part in named if kind == "clip_vision_model" and "post_layernorm" in name]
    layer = getattr(owner.config, "vision_feature_layer", None)
    tower = getattr(owner, "vision_tower", None)
    if tower is None or layer is None:
        return found
    layers = next(child for child in tower.modules() if isinstance(child, nn.ModuleList))
    hidden_states = len(layers) + 1
    taken = {index % hidden_states for index in (layer if isinstance(layer, list | tuple) else [layer])}
    if owner.config.model_type == "internvl" and layer == -1:
        return found  # takes what comes after the last norm
    for unused in layers[max(taken) :]:
        found += unused.parameters()
    return found + [parameter for name, parameter in tower.named_parameters() if "post_layernorm" in name]


def hear_sounds_apart(owner: Any) -> None:
    """Keep the features of a sound from depending on what else is in the batch, in Qwen3-Omni's tower.

    It fills all chunks up to the longest one with silence, and its convolutions have a bias: a sound shorter than a
    chunk would otherwise hear, at its end, whether a longer one shares its micro-batch.
    """
    tower = getattr(owner, "audio_tower", None)
    if tower is None or not hasattr(tower, "conv2d1"):
        return
    convolutions: list[nn.Module] = [tower.conv2d1, tower.conv2d2]
    ends: list[Tensor] = []  # frames of every chunk of the batch, as if its sound were alone, after each convolution

    def measure(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        frames = kwargs["feature_lens"] if "feature_lens" in kwargs else args[1]
        chunk = 2 * module.n_window  # type: ignore[operator]
        own = frames.clamp(max=chunk).repeat_interleave(-(-frames // chunk))
        ends[:] = [(own - 1) // 2 + 1, ((own - 1) // 2) // 2 + 1]

    def silence(stage: int) -> Callable[..., Tensor]:
        def apply(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            here, ends[stage] = ends[stage].split([len(output), len(ends[stage]) - len(output)])
            places = torch.arange(output.shape[-1], device=output.device)
            return output.masked_fill((places >= here[:, None])[:, None, None], 0)

        return apply

    tower.register_forward_pre_hook(measure, with_kwargs=True)
    for stage, convolution in enumerate(convolutions):
        convolution.register_forward_hook(silence(stage))


def give_audio_method(owner: Any) -> None:
    """Give a model that merges sounds itself the method and the hook by which others do."""
    owner.get_audio_features = _EncodeSounds(owner)
    owner.register_forward_pre_hook(_place_sounds, with_kwargs=True)


class _EncodeSounds:
    """``get_audio_features`` of Qwen2-Audio: mel features ``[sounds, mels, frames]`` to ``[tokens, hidden]``."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __call__(self, input_features: Tensor, feature_attention_mask: Tensor) -> Any:
        tower = self.owner.audio_tower
        frames, features = padded_audio_lengths(tower, feature_attention_mask)
        places = torch.arange((input_features.shape[-1] - 2) // 2 + 1, device=input_features.device)
        mask = bidirectional_mask(tower.config, places < frames[:, None], tower.dtype)
        output = tower(input_features, attention_mask=mask)
        hidden = self.owner.multi_modal_projector(output.last_hidden_state)
        output.last_hidden_state = hidden[places[: hidden.shape[1]] < features[:, None]]
        return output


def _place_sounds(owner: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Hand the model embeddings with the sounds in them.

    Its own merge takes a row without two placeholders in succession for one of an older format.
    """
    tokens, sounds = kwargs.get("input_ids"), kwargs.get("input_features")
    if tokens is None or sounds is None:
        return args, kwargs
    embeds = owner.get_input_embeddings()(tokens)
    features = owner.get_audio_features(sounds, kwargs.get("feature_attention_mask")).last_hidden_state
    places = tokens == owner.config.audio_token_id
    if int(places.sum()) != len(features):
        raise DataError(
            f"the batch has {int(places.sum())} audio placeholders for {len(features)} audio features",
            "give each sound as many placeholder tokens as it has features (its processor does)",
        )
    embeds = embeds.masked_scatter(places.unsqueeze(-1), features.to(embeds.dtype))
    merged = {"input_ids": None, "input_features": None, "feature_attention_mask": None, "inputs_embeds": embeds}
    return args, {**kwargs, **merged}
