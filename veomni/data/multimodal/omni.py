"""Composed models: encoders and decoders of any of the kinds in ``veomni.families.omni``."""

from typing import Any

from PIL.Image import Image

from veomni.data.multimodal.family import MediaFeatures
from veomni.data.multimodal.qwen_audio import Qwen2Audio
from veomni.families.omni import DECODERS, ENCODERS


class Omni(Qwen2Audio):
    """What a composed model's encoders take and its decoders generate; each feature has a placeholder."""

    def __post_init__(self) -> None:
        encoders = {"image": self.config.vision_config, "audio": self.config.audio_config}
        kinds = [kind for kind, encoder in encoders.items() if encoder is not None]
        self.placeholders = {kind: self.token(f"{kind}_token_id") for kind in (*kinds, *self.config.decoders)}

    @classmethod
    def image_processor_of(cls, config: Any) -> str | None:
        """Return the processor of the image encoder, or None without one."""
        return None if config.vision_config is None else ENCODERS.get(config.vision_config.model_type).image_processor

    def image(self, image: Image) -> MediaFeatures:
        """Return ``pixel_values`` ``[1, 3, height, width]``, or patches with their ``image_grid_thw`` ``[1, 3]``."""
        made = self.image_processor(images=[image], return_tensors="pt")
        if "image_grid_thw" in made:
            tokens = int(made["image_grid_thw"].prod()) // self.image_processor.merge_size**2
        else:
            patch = self.config.vision_config.patch_size
            down, across = patch if isinstance(patch, list | tuple) else (patch, patch)
            height, width = made["pixel_values"].shape[-2:]
            tokens = (height // down) * (width // across)
        return MediaFeatures(dict(made), self.placeholders["image"] * tokens)

    def generated(self, kind: str, values: Any) -> MediaFeatures:
        """Return what a decoder reads, and a placeholder for each of its tokens."""
        tensors = DECODERS.get(kind).read(values, **self.config.decoders[kind])
        tokens = len(next(iter(tensors.values())))
        return MediaFeatures(tensors, self.placeholders[kind] * tokens, "to be generated")
