"""The processors of a model: from the files beside its weights, or made for its configuration where there are none.

transformers' own image processors and feature extractors are used, the former in their Pillow variants: the same
pixels on any machine, with torchvision or without. Its video processors cannot be built without torchvision, so their
settings are read from the same files, and frames go through ``patches.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt

from veomni.data.multimodal.family import Family, FamilyParts, family_of
from veomni.data.multimodal.frames import VideoDecoder, usable_decoder
from veomni.errors import ConfigError, ModelError
from veomni.families.record import family_record

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_FILES = {
    "image_processor": ["preprocessor_config.json"],
    "video_processor": ["video_preprocessor_config.json", "preprocessor_config.json"],
    "feature_extractor": ["preprocessor_config.json"],
}
_GEOMETRY = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
}


Count = Annotated[int, Ge(1)]


@dataclass(frozen=True)
class MediaSettings:
    """What a run changes of a model's processors; None keeps what the model's files say.

    Attributes:
        image_min_pixels: Least pixels of an image after resizing (models with patches of any number).
        image_max_pixels: Most pixels of an image after resizing.
        video_fps: Frames per second that are seen.
        video_min_frames: Least frames of a video that are seen.
        video_max_frames: Most frames of a video that are seen.
        video_max_pixels: Most pixels after resizing: of a frame, or of a whole video (Qwen3-VL, GLM-4V).
        use_audio_in_video: Also use the audio track of videos (omni models).
        video_decoder: Video decoding backend. torchcodec jumps to the frames that are seen and gives the same pixels,
            but does not find damage that the codec covers up; without FFmpeg's libraries PyAV does it.
    """

    image_min_pixels: Count | None = None
    image_max_pixels: Count | None = None
    video_fps: Annotated[float, Gt(0)] | None = None
    video_min_frames: Count | None = None
    video_max_frames: Count | None = None
    video_max_pixels: Count | None = None
    use_audio_in_video: bool = False
    video_decoder: VideoDecoder = "pyav"


def build_family(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path | None = None,
    settings: MediaSettings | None = None,
) -> Family:
    """Return what turns media into inputs of a model.

    Args:
        config: The model's configuration; of an omni model, the thinker's or the whole model's.
        tokenizer: The model's tokenizer.
        directory: Holds the files of the model's processors; None, or without files, makes them for ``config``.
        settings: What the run changes.

    Raises:
        ConfigError: no family is known for the model, it has no such setting, or torchcodec is not installed.
        ModelError: a file cannot be read, or the tokenizer lacks the model's placeholders.
    """
    settings = settings or MediaSettings()
    config = getattr(config, "thinker_config", config)
    family = family_of(config.model_type)
    parts = FamilyParts(
        config, tokenizer, _image_processor(family, config, directory, settings), _feature_extractor(config, directory),
        _video_settings(family, config, directory, settings), settings.use_audio_in_video,
        usable_decoder(settings.video_decoder),
    )  # fmt: skip
    return family(parts)


def settings_of(family: Family) -> dict[str, Any]:
    """Return everything that decides what a family makes of an item, in a form JSON can hold."""
    parts = family.parts
    processors = [part.to_dict() for part in (parts.image_processor, parts.feature_extractor) if part is not None]
    config = json.loads(json.dumps(parts.config.to_dict(), default=str))
    return {
        "family": type(family).__name__, "model": {key: config[key] for key in sorted(config) if key.endswith("_id")},
        "placeholders": family.placeholders, "processors": json.loads(json.dumps(processors, default=str)),
        "video": dict(parts.video), "use_audio_in_video": parts.use_audio_in_video,
        "video_decoder": parts.video_decoder,
    }  # fmt: skip


def _image_processor(
    family: type[Family], config: PreTrainedConfig, directory: str | Path | None, settings: MediaSettings
) -> Any:
    import transformers

    default = family.image_processor_of(config)
    if default is None:
        return None
    values = _file(directory, "image_processor") or _for_config(config)
    name = str(values.pop("image_processor_type", default)).removesuffix("Fast").removesuffix("Pil")
    kind = getattr(transformers, f"{name}Pil", None) if name.endswith("ImageProcessor") else None
    if kind is None:
        raise ModelError(f"{directory}: transformers has no {name} for Pillow", "train with another image processor")
    processor = kind.from_dict({key: value for key, value in values.items() if key not in _OF_AUDIO})
    bounds = {"shortest_edge": settings.image_min_pixels, "longest_edge": settings.image_max_pixels}
    changed = {key: value for key, value in bounds.items() if value is not None}
    if changed and not processor.size.longest_edge:
        raise _pointless("image_min_pixels and image_max_pixels", config)
    processor.size = replace(processor.size, **changed)
    return processor


def _pointless(keys: str, config: PreTrainedConfig) -> ConfigError:
    problem = f"{keys}: the processor of {config.model_type} models has no such setting"
    return ConfigError(problem, "leave it out", " ".join(f"MediaSettings.{key}" for key in keys.split(" and ")))


def _feature_extractor(config: PreTrainedConfig, directory: str | Path | None) -> Any:
    from transformers import WhisperFeatureExtractor

    audio = getattr(config, "audio_config", None)
    if audio is None:
        return None
    values = _file(directory, "feature_extractor")
    if "feature_size" in values:
        return WhisperFeatureExtractor.from_dict(values)
    extractor = WhisperFeatureExtractor(
        feature_size=audio.num_mel_bins, chunk_length=family_record(audio).audio_seconds
    )
    if family_record(audio).padded_audio:
        extractor.nb_max_frames = 2 * audio.max_source_positions
        extractor.n_samples = extractor.nb_max_frames * extractor.hop_length
    return extractor


def _video_settings(
    family: type[Family], config: PreTrainedConfig, directory: str | Path | None, settings: MediaSettings
) -> dict[str, Any]:
    changed = {
        "fps": settings.video_fps, "min_frames": settings.video_min_frames, "max_frames": settings.video_max_frames,
        "max_pixels": settings.video_max_pixels,
    }  # fmt: skip
    changed = {key: value for key, value in changed.items() if value is not None}
    if not family.video_defaults:
        if settings.video_decoder != "pyav":
            raise _pointless("video_decoder", config)
        values: dict[str, Any] = {}
    else:
        given = _file(directory, "video_processor")
        values = {**family.video_defaults, **(given or _for_config(config))}
        older = {"shortest_edge": values.get("min_pixels"), "longest_edge": values.get("max_pixels")}
        older = {key: value for key, value in older.items() if value is not None}
        values["size"] = {**family.video_defaults["size"], **(values["size"] or {}), **older}
    known = [*family.video_defaults, "cap_pixels_per_frame"]
    kept = {key: values[key] for key in known if values.get(key) is not None}
    for key, value in changed.items():
        if key == "max_pixels" and "longest_edge" in kept.get("size", {}):
            least = min(kept["size"]["shortest_edge"], value)
            kept["size"] = {"shortest_edge": least, "longest_edge": value}
        elif key in kept:
            kept[key] = value
        elif key == "max_frames" and "num_frames" in kept:  # InternVL sees a fixed number
            kept["num_frames"] = value
        else:
            raise _pointless(f"video_{key}", config)
    return kept


def _for_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings of a processor that a model's configuration decides."""
    vision = getattr(config, "vision_config", None)
    found = {key: getattr(vision, name, None) for key, name in _GEOMETRY.items()}
    side = getattr(vision, "image_size", None)
    if side is not None and found["merge_size"] is None:  # images of one size
        height, width = side if isinstance(side, list | tuple) else (side, side)
        return {"size": {"height": height, "width": width}, "crop_size": {"height": height, "width": width}}
    return {key: value for key, value in found.items() if value is not None}


_OF_AUDIO = ("feature_extractor_type", "feature_size", "hop_length", "n_fft", "n_samples", "nb_max_frames")


def _file(directory: str | Path | None, part: str) -> dict[str, Any]:
    """Return what the files of a model say about one part; the newer ``processor_config.json`` holds all of them."""
    if directory is None:
        return {}
    for name in ("processor_config.json", *_FILES[part]):
        path = Path(directory) / name
        try:
            values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            values = values.get(part) if name == "processor_config.json" else values
        except (ValueError, OSError, AttributeError) as error:
            raise ModelError(f"{path}: cannot be read: {error}", "save the processor again") from error
        if isinstance(values, Mapping) and values:
            return dict(values)
    return {}
