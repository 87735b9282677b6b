"""What there is to compute on in the images, videos and audio of a batch, by their real sizes."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from veomni.families.record import family_record
from veomni.metrics.attention_shapes import UncountableError
from veomni.models.transformers_api.encoders import audio_lengths

Amounts = Mapping[str, int]
"""Positions by the place of the encoder that computes on each: "hidden" in its blocks, "features" behind them, "convN"
in the convolutions in front; and the (query, key) pairs of a block of attention, "full" or in "window"s."""
Measure = Callable[[Mapping[str, Any]], Amounts]
"""From the inputs of a micro-batch to its amounts."""


def vision_measure(config: Any, encoder: Any) -> Measure:
    """Return what measures the images and videos of a model; UncountableError where their sizes are not understood."""
    vision = config.vision_config
    if hasattr(vision, "spatial_merge_size"):
        merge = vision.spatial_merge_size
        window = vision.window_size // merge // vision.patch_size if hasattr(vision, "fullatt_block_indexes") else None
        return lambda inputs: _of_grids(inputs, merge, window)
    features = getattr(config, "mm_tokens_per_image", None) or getattr(config, "image_seq_length", None)
    size, patch = (_pair(getattr(vision, name, None)) for name in ("image_size", "patch_size"))
    if not features or size is None or patch is None or family_record(vision).any_size:
        raise UncountableError("the sizes of its images are not understood")
    patches = (size[0] // patch[0]) * (size[1] // patch[1])
    names = {name.rpartition(".")[2] for name, _ in encoder.named_parameters()}
    hidden = patches + bool(names & {"cls_token", "class_embedding"})
    return lambda inputs: _of_squares(len(inputs.get("pixel_values", ())), patches, hidden, features)


def audio_measure(encoder: Any) -> Measure:
    """Return what measures the audio clips of an encoder; UncountableError for one whose frames are not understood."""
    lengths = audio_lengths(encoder)
    if lengths is None:
        raise UncountableError("the frames of its audio are not understood")
    config = encoder.config
    chunk = 2 * config.n_window if hasattr(config, "n_window") else None
    mels = config.num_mel_bins if hasattr(encoder, "conv2d1") else None
    ratio = config.n_window_infer // chunk if mels is not None and chunk is not None else 1

    def measure(inputs: Mapping[str, Any]) -> Amounts:
        mask = inputs.get("feature_attention_mask")
        if mask is None:
            return {}
        frames = mask.sum(-1)
        found = _of_frames(frames, chunk, mels)
        features = lengths(frames)[1]
        if mels is not None:  # of two dimensions: its positions are its features, and windows span several chunks
            assert chunk is not None
            span = int(lengths(torch.tensor([chunk]))[1]) * ratio
            pairs = (features // span) * span**2 + (features % span) ** 2
            found |= {"hidden": int(features.sum()), "full": int(pairs.sum())}
        return found | {"features": int(features.sum())}

    return measure


def _pair(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    height, width = value if isinstance(value, list | tuple) else (value, value)
    return int(height), int(width)


def _of_grids(inputs: Mapping[str, Any], merge: int, window: int | None) -> Amounts:
    grids = [row for key in ("image_grid_thw", "video_grid_thw") for row in _rows(inputs.get(key))]
    patches = sum(time * rows * columns for time, rows, columns in grids)
    found = {"conv0": patches, "hidden": patches, "features": patches // merge**2}
    found["full"] = sum(time * (rows * columns) ** 2 for time, rows, columns in grids)
    if window is not None:  # of so many features in height and width
        sides = ((time, rows // merge, columns // merge) for time, rows, columns in grids)
        found["window"] = merge**4 * sum(t * _squares(r, window) * _squares(c, window) for t, r, c in sides)
    return found


def _rows(sizes: Tensor | None) -> list[list[int]]:
    return [] if sizes is None else sizes.tolist()


def _squares(length: int, window: int) -> int:
    """Return the sum of squares of the pieces of a length."""
    return (length // window) * window**2 + (length % window) ** 2


def _of_squares(images: int, patches: int, hidden: int, features: int) -> Amounts:
    per_image = {"conv0": patches, "hidden": hidden, "features": features, "full": hidden**2}
    return {name: images * amount for name, amount in per_image.items()}


def _of_frames(frames: Tensor, chunk: int | None, mels: int | None) -> dict[str, int]:
    """Return positions after each convolution: the first of one dimension keeps frames, all others halve them."""
    if chunk is not None:
        whole, rest = frames // chunk, frames % chunk
        frames = torch.cat([torch.full((int(whole.sum()),), chunk), rest[rest > 0]])
    if mels is None:
        halved = (frames - 1) // 2 + 1
        sums = [int(each.sum()) for each in (frames, halved, halved, halved * halved)]
        return dict(zip(("conv0", "conv1", "hidden", "full"), sums, strict=True))
    found = {}
    for layer in range(3):
        frames, mels = (frames - 1) // 2 + 1, (mels - 1) // 2 + 1
        found[f"conv{layer}"] = mels * int(frames.sum())
    return found
