"""The fields of a micro-batch: how each is packed, padded and split over ranks, and which part of a batch holds it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from veomni.registry import Registry

IGNORE_INDEX = -100
"""The label that no loss is taken on (transformers' convention)."""


@dataclass(frozen=True)
class Field:
    """How the values of one field are packed.

    Attributes:
        per: "token" holds one entry per token along ``dim``: samples of a row are concatenated, the row is padded to
            its length, rows are stacked, and sequence parallelism gives each rank its shard. "item" holds images,
            patches, sizes or audio: those of all rows are concatenated along ``dim``, in the order of the rows, and
            every rank of a sequence group gets all of them. "row" describes whole rows, the same on all of their ranks.
        pad: What the padded tail of a row holds; and, for items, what fills the shorter of two along their last axis
            where ``ragged``.
        dim: The axis that is concatenated; for tokens counted in a sample without batch.
        ragged: Items differ in their last axis (mel frames), and are padded to the longest.
        counts: The component of a model whose loss is a mean over this field's tokens: those that are not negative.
        holder: Where a micro-batch keeps it: "inputs" are the model's arguments, "targets" are read by the loss,
            "rows" describe positions.
    """

    per: Literal["token", "item", "row"]
    pad: float = 0
    dim: int = 0
    ragged: bool = False
    counts: str | None = None
    holder: Literal["inputs", "targets", "rows"] = "inputs"


# Fields not in it are passed to the model unchanged, and rejected where they would be packed or split.
FIELDS: Registry[Field] = Registry("batch field")
"""Fields by name; ``FIELDS.register("your_field")(Field("item"))`` adds one of your model's."""

_ITEMS = (
    "pixel_values", "image_grid_thw", "image_sizes", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts",
    "video_second_per_grid", "audio_feature_lengths",
)  # fmt: skip
_BUILT_IN = {
    **dict.fromkeys(("input_ids", "token_type_ids", "mm_token_type_ids"), Field("token")),
    **dict.fromkeys(("labels", "shift_labels"), Field("token", IGNORE_INDEX)),
    **dict.fromkeys(_ITEMS, Field("item")),
    "inputs_embeds": Field("token", dim=-2),
    "position_ids": Field("token", dim=-1),
    "position_fractions": Field("token", holder="rows"),
    "source_ids": Field("token", -1, holder="targets"),
    "loss_weights": Field("token", 1, holder="targets"),
    **dict.fromkeys(("input_features", "feature_attention_mask"), Field("item", ragged=True)),
    **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"), Field("row")),
    # Decoders of composed models (veomni/models/omni/decoders.py).
    "codes": Field("token", IGNORE_INDEX),
    "codes_next": Field("token", IGNORE_INDEX, counts="codes"),
    **dict.fromkeys(("latents", "latents_next", "latents_noise"), Field("token")),
    "latents_place": Field("token", -1.0),
    "latents_time": Field("token", -1.0, counts="latents"),
}
for _name, _field in _BUILT_IN.items():
    FIELDS.register(_name)(_field)


def holder_of(name: str) -> str:
    """Return which part of a micro-batch holds a field; the model's arguments, for one that is not in the table."""
    return FIELDS.get(name).holder if name in FIELDS else "inputs"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def scope_of(name: str) -> str | None:
    """Return what a field has an entry per; None for one that is not in the table."""
    return FIELDS.get(name).per if name in FIELDS else None


def component_tokens(inputs: Mapping[str, Any]) -> dict[str, int]:
    """Count the tokens that each decoder's loss is a mean over, for all decoders in the table; text is apart."""
    counted = {field.counts: name for name in FIELDS if (field := FIELDS.get(name)).counts is not None}
    return {
        str(component): int((inputs[name] >= 0).sum()) if name in inputs else 0
        for component, name in sorted(counted.items())
    }


def shift_left(values: Tensor, fill: float) -> Tensor:
    """Return ``[..., seq]`` values moved one position forward, labels to their predictions; ``fill`` ends each row."""
    return F.pad(values, (0, 1), value=fill)[..., 1:]
