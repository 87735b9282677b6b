"""Composed models: encoders and decoders of any of the kinds in ``veomni.models.omni``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from veomni.data.multimodal.family import Family, FamilyParts, MediaFeatures
from veomni.data.multimodal.qwen_audio import at_least_one, halved_twice, mel_features
from veomni.models.omni import DECODERS, ENCODERS

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedConfig

    from veomni.data.multimodal.audio_clip import AudioClip


class Omni(Family):
    """What a composed model's encoders take and its decoders generate; each feature has a placeholder."""

    def __init__(self, parts: FamilyParts) -> None:
        super().__init__(parts)
        encoders = {"image": parts.config.vision_config, "audio": parts.config.audio_config}
        self.placeholders = {
            kind: self.token(f"{kind}_token_id") for kind, encoder in encoders.items() if encoder is not None
        } | {decoder: self.token(f"{decoder}_token_id") for decoder in parts.config.decoders}

    @classmethod
    def image_processor_of(cls, config: PreTrainedConfig) -> str | None:
        """Return the processor of the image encoder, or None without one."""
        return None if config.vision_config is None else ENCODERS.get(config.vision_config.model_type).image_processor

    def image(self, image: Image) -> MediaFeatures:
        """Return ``pixel_values`` ``[1, 3, height, width]``, or patches with their ``image_grid_thw`` ``[1, 3]``."""
        processor, encoder = self.parts.image_processor, self.parts.config.vision_config
        made = processor(images=[image], return_tensors="pt")
        if "image_grid_thw" in made:
            tokens = int(made["image_grid_thw"].prod()) // processor.merge_size**2
        else:
            patch = encoder.patch_size
            down, across = patch if isinstance(patch, list | tuple) else (patch, patch)
            height, width = made["pixel_values"].shape[-2:]
            tokens = (height // down) * (width // across)
        return MediaFeatures(dict(made), self.placeholders["image"] * tokens)

    def generated(self, kind: str, values: Any) -> MediaFeatures:
        """Return what a decoder reads, and a placeholder for each of its tokens.

        Raises:
            ValueError: it is not what the decoder generates.
        """
        tensors = DECODERS.get(kind).read(values, **self.parts.config.decoders[kind])
        tokens = len(next(iter(tensors.values())))
        return MediaFeatures(dict(tensors), self.placeholders[kind] * tokens, "to be generated")

    def audio(self, clip: AudioClip) -> MediaFeatures:
        """Return ``input_features`` ``[1, mels, frames]`` and ``feature_attention_mask`` ``[1, frames]``."""
        extractor = self.parts.feature_extractor
        tensors = mel_features(extractor, clip, extractor.n_samples)
        tokens = halved_twice(int(tensors["feature_attention_mask"].sum()))
        return MediaFeatures(tensors, self.placeholders["audio"] * at_least_one(tokens, clip))
