"""What each key of a micro-batch is made of, and so how samples are packed, padded and split over ranks.

One table. A key that is not in it is refused by whoever would have to pack or split it, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from veomni.batch.micro_batch import IGNORE_INDEX, LOSS_WEIGHTS, SOURCE_IDS
from veomni.registry import Registry


@dataclass(frozen=True)
class Field:
    """How the values of one key are packed.

    Attributes:
        per: "token" holds one entry per token along ``dim``: samples of a row are concatenated, the row is padded to
            its length, rows are stacked, and sequence parallelism gives each rank its part. "item" holds images,
            patches, sizes or sounds: those of all rows are concatenated along ``dim``, in the order of the rows, and
            every rank of a sequence group gets all of them.
        pad: What the padded tail of a row holds; and, for items, what fills the shorter of two along their last axis
            where ``ragged``.
        dim: The axis that is concatenated; for tokens counted in a sample without batch.
        ragged: Items differ in their last axis (mel frames), and are padded to the longest.
        counts: The part of a model whose loss is a mean over this key's tokens: those that are not negative.
    """

    per: Literal["token", "item"]
    pad: float = 0
    dim: int = 0
    ragged: bool = False
    counts: str | None = None


FIELDS: Registry[Field] = Registry("batch key")
"""Key of a micro-batch to its rule; ``FIELDS.register("your_key")(Field("item"))`` adds one of your model's."""

_TOKENS: dict[str, float] = {
    "input_ids": 0, "labels": IGNORE_INDEX, "shift_labels": IGNORE_INDEX, "token_type_ids": 0, "mm_token_type_ids": 0,
    SOURCE_IDS: -1, LOSS_WEIGHTS: 1, "position_fractions": 0,
}  # fmt: skip
_ITEMS = (
    "pixel_values", "image_grid_thw", "image_sizes", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts",
    "video_second_per_grid", "audio_feature_lengths",
)  # fmt: skip

for _name, _value in _TOKENS.items():
    FIELDS.register(_name)(Field("token", _value))
for _name in _ITEMS:
    FIELDS.register(_name)(Field("item"))
FIELDS.register("inputs_embeds")(Field("token", dim=-2))
FIELDS.register("position_ids")(Field("token", dim=-1))
FIELDS.register("input_features")(Field("item", ragged=True))
FIELDS.register("feature_attention_mask")(Field("item", ragged=True))


def part_tokens(inputs: Mapping[str, Any]) -> dict[str, int]:
    """Count the tokens that each part's loss is a mean over, for all parts that are known; text is apart."""
    found = {}
    for key in FIELDS:
        part = FIELDS.get(key).counts
        if part is not None:
            found[part] = int((inputs[key] >= 0).sum()) if key in inputs else 0
    return dict(sorted(found.items()))
