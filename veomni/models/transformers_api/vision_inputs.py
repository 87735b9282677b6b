"""What vision towers derive from the sizes of images, computed where the sizes are still on the CPU.

A tower would otherwise read the sizes back from the accelerator in every micro-batch, and wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from veomni.models.transformers_api import hf

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}


def vision_inputs(config: PreTrainedConfig, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what transformers' towers of images and videos take ready-made, by the names its models take them under.

    Args:
        config: The model's configuration.
        batch: A micro-batch; without ``image_grid_thw`` and ``video_grid_thw`` there is nothing to compute.

    Returns:
        ``image_cu_seqlens`` int32 ``[frames + 1]``, ``image_position_ids`` ``[patches, 2]``, and where attention has
        windows ``image_window_index`` and ``image_cu_window_seqlens``; the same for videos.
    """
    vision = getattr(config, "vision_config", None)
    found: dict[str, Tensor] = {}
    for modality, key in _GRIDS.items():
        grid = batch.get(key)
        if grid is not None and hasattr(vision, "spatial_merge_size"):
            made = hf.vision_geometry(vision, grid)
            found |= {f"{modality}_{name}": value for name, value in made.items()}
    return found
