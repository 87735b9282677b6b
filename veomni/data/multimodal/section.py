"""The section ``data.media``: images, videos and audio of conversations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from typing_extensions import override

from veomni.config.base import PathText, Section
from veomni.config.problems import Problem

if TYPE_CHECKING:
    from veomni.data import Encoder
    from veomni.data.multimodal import MultimodalTransform


class MediaSection(Section):
    """Where media are, how large they may be, and what the model sees; null keeps what the model's files say."""

    configures = ("MediaReader", "MediaLimits", "MediaSettings", "SkipBadMedia", "Fetch")

    root: PathText = Field(
        default=".",
        description="Directory that paths of media are relative to; nothing outside it is read (/ allows all).",
    )
    url_hosts: list[str] = Field(
        default=[],
        description="Hosts that media are fetched from (.example.com allows all below it); empty allows no URLs.",
    )
    url_timeout: float = Field(default=30.0, gt=0, description="Seconds in which a URL must have been fetched.")
    on_bad_media: Literal["error", "skip"] = Field(
        default="error",
        description="What happens to a record with media that cannot be used: skip leaves it out and says so.",
    )
    max_skipped: int = Field(
        default=100, ge=0, description="How many records skip may leave out before it is an error."
    )
    max_bytes: int = Field(default=1 << 29, ge=1, description="Largest file.")
    max_pixels: int = Field(
        default=64_000_000,
        ge=1,
        description="Most pixels of an image or frame before resizing; checked before decoding.",
    )
    max_aspect_ratio: float = Field(default=200.0, ge=1, description="Longest side over shortest side.")
    max_seconds: float = Field(default=3600.0, gt=0, description="Longest video or audio clip.")
    image_min_pixels: int | None = Field(default=None, ge=1, description="Least pixels of an image after resizing.")
    image_max_pixels: int | None = Field(default=None, ge=1, description="Most pixels of an image after resizing.")
    video_fps: float | None = Field(default=None, gt=0, description="Frames per second that are seen.")
    video_min_frames: int | None = Field(default=None, ge=1, description="Least frames of a video that are seen.")
    video_max_frames: int | None = Field(default=None, ge=1, description="Most frames of a video that are seen.")
    video_max_pixels: int | None = Field(
        default=None,
        ge=1,
        description="Most pixels after resizing: of a frame, or of a whole video (Qwen3-VL, GLM-4V).",
    )
    use_audio_in_video: bool = Field(default=False, description="Also use the audio track of videos (omni models).")
    video_decoder: Literal["pyav", "torchcodec"] = Field(
        default="pyav",
        description="Video decoding backend. torchcodec jumps to those that are seen and gives the same "
        "pixels, but does not find damage that the codec covers up; without FFmpeg's libraries PyAV does it.",
    )
    cache_gib: float = Field(
        default=0.0, ge=0, description="Size in GiB of the cache of decoded media below data.cache_dir; 0 keeps none."
    )

    @override
    def problems(self, config: Any, world: int | None) -> Iterator[Problem]:
        changed = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        if changed and "multimodal" not in config.data.data_types:
            yield Problem(
                f"data.media.{changed[0]} has no meaning with data.data_type {config.data.data_type}",
                "leave it out, or set data.data_type to multimodal",
            )

    def build_transform(self, config: Any, tokenizer: Any) -> MultimodalTransform:
        """Return what makes samples of conversations with media.

        Raises:
            ConfigError: no family is known for the model, or it has no such setting.
            DataError: there is no chat template.
        """
        from veomni.data.multimodal import (
            FeatureCache,
            MediaLimits,
            MediaReader,
            MediaSettings,
            MultimodalTransform,
            build_family,
            settings_of,
        )  # fmt: skip
        from veomni.data.sources.cache import cache_directory
        from veomni.data.sources.fetch import Fetch
        from veomni.data.sources.formats import MESSAGES
        from veomni.data.text.chat_templates import find_chat_template
        from veomni.models.build.config import find_directory

        values = self.model_dump()
        settings = MediaSettings(**{field.name: values[field.name] for field in fields(MediaSettings)})
        limits = MediaLimits(**{field.name: values[field.name] for field in fields(MediaLimits)})
        given = (find_directory(path) for path in (config.model.tokenizer_path, config.model.model_path) if path)
        directory = next((path for path in given if path), None)
        family = build_family(config.model.build_config(), tokenizer, directory, settings)
        cache = None
        if self.cache_gib:
            place = cache_directory(config.data.cache_dir) / "media"
            cache = FeatureCache(place, int(self.cache_gib * (1 << 30)), [settings_of(family), asdict(limits)])
        template = find_chat_template(config.data.chat_template, tokenizer)
        fetch = Fetch(self.url_hosts, max_bytes=self.max_bytes, timeout=self.url_timeout) if self.url_hosts else None
        reader = MediaReader(Path(self.root), fetch, limits)
        return MultimodalTransform(family, tokenizer, template, reader, MESSAGES, cache)

    def build_encoder(self, config: Any, tokenizer: Any) -> Encoder:
        """Return what turns conversations with media, and texts mixed with them, into tokens."""
        from veomni.data import Encoder
        from veomni.data.multimodal import SkipBadMedia

        skip = SkipBadMedia(self.max_skipped) if self.on_bad_media == "skip" else None
        return Encoder(tokenizer, config.data.chat_template, self.build_transform(config, tokenizer), skip)
