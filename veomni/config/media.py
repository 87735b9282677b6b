"""The section ``data.media``: images, videos and sounds of conversations."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from veomni.config.base import PathText, Section


class MediaConfig(Section):
    """Where media are, how large they may be, and what the model sees; null keeps what the model's files say."""

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
    max_seconds: float = Field(default=3600.0, gt=0, description="Longest video or sound.")
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
    sound_in_video: bool = Field(default=False, description="Hear the sound of videos as well (omni models).")
    video_decoder: Literal["pyav", "torchcodec"] = Field(
        default="pyav",
        description="Who decodes the frames of videos. torchcodec jumps to those that are seen and gives the same "
        "pixels, but does not find damage that the codec covers up; without FFmpeg's libraries PyAV does it.",
    )
    cache_gib: float = Field(
        default=0.0, ge=0, description="Size in GiB of the cache of decoded media below data.cache_dir; 0 keeps none."
    )
