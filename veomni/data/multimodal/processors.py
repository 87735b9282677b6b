"""The processors of a model: from the files beside its weights, or made for its configuration where there are none.

transformers' image processors for Pillow give the same pixels on any machine. Its video processors need torchvision:
their settings are read from the same files, and frames go through ``pixels.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt

from veomni.data.multimodal.family import Family
from veomni.data.multimodal.frames import VideoDecoder, usable_decoder
from veomni.errors import ConfigError, ModelError
from veomni.families.record import RECORDS, family_record

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_GEOMETRY = ("patch_size", "temporal_patch_size", "spatial_merge_size")  # in configurations
_OF_AUDIO = ("feature_extractor_type", "feature_size", "hop_length", "n_fft", "n_samples", "nb_max_frames")

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
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase,
    directory: str | Path | None = None, settings: MediaSettings | None = None,
) -> Family:  # fmt: skip
    """Return what turns media into inputs of a model.

    ``config`` is the model's; of an omni model, the thinker's or the whole model's. ``directory`` holds the files of
    its processors; None, or without files, makes them for ``config``.

    ConfigError where no family is known for the model, it has no such setting, or torchcodec is not installed;
    ModelError where a file cannot be read, or the tokenizer lacks the model's placeholders.
    """
    settings = settings or MediaSettings()
    config = getattr(config, "thinker_config", config)
    path = family_record(config).media
    if not path:
        known = ", ".join(sorted(name for name, record in RECORDS.items() if record.media))
        fix = f"register a FamilyRecord(media=...); known: {known}"
        raise ConfigError(f"no multimodal family is known for {config.model_type!r} models", fix)
    family: type[Family] = resolve_name(path)
    image_processor = _image_processor(family, config, directory, settings)
    extractor, video = _feature_extractor(config, directory), _video_settings(family, config, directory, settings)
    decoder = usable_decoder(settings.video_decoder)
    return family(config, tokenizer, image_processor, extractor, video, settings.use_audio_in_video, decoder)


def settings_of(family: Family) -> dict[str, Any]:
    """Return everything that decides what a family makes of an item, in a form JSON can hold."""
    ids = {key: value for key, value in family.config.to_dict().items() if key.endswith("_id")}
    own = {name: value for name, value in vars(family).items() if name not in ("config", "tokenizer")}
    facts = {"family": type(family).__name__, "model": ids, **own}
    plain = json.dumps(facts, default=lambda one: one.to_dict() if hasattr(one, "to_dict") else str(one))
    return dict(json.loads(plain))


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
    changed = _given(shortest_edge=settings.image_min_pixels, longest_edge=settings.image_max_pixels)
    if changed and not processor.size.longest_edge:
        raise _pointless(config, "image_min_pixels", "image_max_pixels")
    processor.size = replace(processor.size, **changed)
    return processor


def _feature_extractor(config: PreTrainedConfig, directory: str | Path | None) -> Any:
    from transformers import WhisperFeatureExtractor

    audio = getattr(config, "audio_config", None)
    if audio is None:
        return None
    values = _file(directory, "feature_extractor")
    if "feature_size" in values:
        return WhisperFeatureExtractor.from_dict(values)
    seconds = family_record(audio).audio_seconds
    extractor = WhisperFeatureExtractor(feature_size=audio.num_mel_bins, chunk_length=seconds)
    if family_record(audio).padded_audio:
        extractor.nb_max_frames = 2 * audio.max_source_positions
        extractor.n_samples = extractor.nb_max_frames * extractor.hop_length
    return extractor


def _video_settings(
    family: type[Family], config: PreTrainedConfig, directory: str | Path | None, settings: MediaSettings
) -> dict[str, Any]:
    defaults = family.video_defaults
    kept: dict[str, Any] = {}
    if defaults:
        values = {**defaults, **(_file(directory, "video_processor") or _for_config(config))}
        older = _given(shortest_edge=values.get("min_pixels"), longest_edge=values.get("max_pixels"))
        values["size"] = {**defaults["size"], **(values["size"] or {}), **older}
        kept = _given(**{key: values.get(key) for key in (*defaults, "cap_pixels_per_frame")})
    elif settings.video_decoder != "pyav":
        raise _pointless(config, "video_decoder")
    changed = _given(fps=settings.video_fps, min_frames=settings.video_min_frames, max_frames=settings.video_max_frames)
    for key, value in changed.items():
        name = "num_frames" if key == "max_frames" and "num_frames" in kept else key  # InternVL sees a fixed number
        if name not in kept:
            raise _pointless(config, f"video_{key}")
        kept[name] = value
    most = settings.video_max_pixels
    if most is not None:
        if "longest_edge" not in kept.get("size", {}):
            raise _pointless(config, "video_max_pixels")
        kept["size"] = {"shortest_edge": min(kept["size"]["shortest_edge"], most), "longest_edge": most}
    return kept


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _pointless(config: PreTrainedConfig, *keys: str) -> ConfigError:
    problem = f"{' and '.join(keys)}: the processor of {config.model_type} models has no such setting"
    return ConfigError(problem, "leave it out", " ".join(f"MediaSettings.{key}" for key in keys))


def _for_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings of a processor that a model's configuration decides."""
    vision = getattr(config, "vision_config", None)
    found = _given(**{name.removeprefix("spatial_"): getattr(vision, name, None) for name in _GEOMETRY})
    side = getattr(vision, "image_size", None)
    if side is None or "merge_size" in found:
        return found
    height, width = side if isinstance(side, list | tuple) else (side, side)  # images of one size
    return {"size": {"height": height, "width": width}, "crop_size": {"height": height, "width": width}}


def _file(directory: str | Path | None, part: str) -> dict[str, Any]:
    """Return what the files of a model say about one part; the newer ``processor_config.json`` holds all of them."""
    if directory is None:
        return {}
    older = ["video_preprocessor_config.json"] if part == "video_processor" else []
    for name in ("processor_config.json", *older, "preprocessor_config.json"):
        path = Path(directory) / name
        try:
            values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            values = values.get(part) if name == "processor_config.json" else values
        except (ValueError, OSError, AttributeError) as error:
            raise ModelError(f"{path}: cannot be read: {error}", "save the processor again") from error
        if isinstance(values, Mapping) and values:
            return dict(values)
    return {}
