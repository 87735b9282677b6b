"""FLOPs of the encoders of a multimodal model, from their modules and the sizes of what they encode."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from veomni.families.encoders import unread_parameters
from veomni.families.record import family_record
from veomni.metrics.attention_shapes import UncountableError
from veomni.metrics.encoder_items import Measure, audio_measure, vision_measure

_VISION, _AUDIO, _PROJECTOR = ("visual", "vision_tower"), "audio_tower", "multi_modal_projector"
_OUTPUTS = ("proj", "out_proj", "projection_layer")
_INPUTS = {"qkv", "q", "k", "v", "q_proj", "k_proj", "v_proj"}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers?)\.(\d+)\.")


class EncoderFlops:
    """Counts the FLOPs of one encoder and its projector, forward and backward, by :class:`FlopsCounter`'s conventions.

    Attention within images, windows and chunks of audio counts by its real pairs; what no forward reads does not count.

    Args:
        measure: From the inputs of a micro-batch to amounts of positions and pairs.
        per: FLOPs of each, by the names of :data:`~veomni.metrics.encoder_items.Amounts`.
        trains: Whether any parameter is trained, so that what is behind it passes gradients on.
    """

    def __init__(self, measure: Measure, per: Mapping[str, float], trains: bool) -> None:
        self.measure, self.per, self.trains = measure, dict(per), trains

    @classmethod
    def derive(cls, owner: nn.Module, parts: Sequence[str], measure: Measure) -> "EncoderFlops":
        """Return the counter of children of ``owner``, in the order in which they run; see ``FlopsCounter``."""
        unread = {id(parameter) for parameter in unread_parameters(owner)}
        config = owner.config.audio_config if _AUDIO in parts else owner.config.vision_config  # type: ignore[union-attr]
        weights = [weight for part in parts for weight in _weights(owner, part, unread)]
        first = min((weight.depth for weight in weights if weight.trainable), default=None)
        per: dict[str, float] = defaultdict(float)
        for weight in weights:
            per[weight.place] += 2 * weight.active * weight.passes(first)
        full = getattr(config, "fullatt_block_indexes", None)
        for block, flops in _attention(owner, parts, unread):
            window = full is not None and block not in full
            per["window" if window else "full"] += flops * (3 if first is not None and block >= first else 1)
        return cls(measure, per, first is not None)

    def step_flops(self, inputs: Sequence[Mapping[str, Any]]) -> float:
        """Return the FLOPs of a step over micro-batches with these inputs, on the CPU."""
        amounts = [self.measure(each) for each in inputs]
        return sum(flops * each.get(name, 0) for each in amounts for name, flops in self.per.items() if flops)


def encoders_of(owner: Any) -> tuple[list[EncoderFlops], list[nn.Module]]:
    """Return the counters of a model's encoders, and the modules that they count.

    ``owner`` is the module whose forward calls the encoders. UncountableError for a model of a family that has no
    record, and where it holds something else besides the language model.
    """
    if not family_record(owner.config).media:
        raise UncountableError(f"the encoders of {owner.config.model_type} are not known")
    own = [name for name, _ in owner.named_parameters(recurse=False)]
    children = {name: child for name, child in owner.named_children() if next(child.parameters(), None) is not None}
    vision = [name for name in children if name in _VISION]
    audio = [name for name in children if name == _AUDIO]
    projector = [name for name in children if name == _PROJECTOR]
    unknown = {*own, *children} - {*vision, *audio, *projector, "language_model", "lm_head"}
    if unknown:
        raise UncountableError(f"it has a part {sorted(unknown)[0]!r}")
    counters = []
    if vision:
        counters.append(
            EncoderFlops.derive(owner, [*vision, *projector], vision_measure(owner.config, children[vision[0]]))
        )
    if audio:
        parts = [*audio, *([] if vision else projector)]
        counters.append(EncoderFlops.derive(owner, parts, audio_measure(children[_AUDIO])))
    return counters, [children[name] for name in (*vision, *audio, *projector)]


class _Weight(NamedTuple):
    place: str  # what it is applied to each of
    depth: int  # negative in front of the blocks, the block, or infinite behind them
    active: int
    trainable: bool

    def passes(self, first: int | None) -> int:
        """Forward, gradient of the input where anything before it is trained, gradient of the weight."""
        before = first is not None and (self.depth >= first if self.depth >= 0 else self.depth > first)
        return 1 + before + self.trainable


_BEHIND = 10**6


def _weights(owner: Any, part: str, unread: set[int]) -> Iterator[_Weight]:
    """Yield the parameters of an encoder or a projector; vectors and lookups cost nothing, and may be trained."""
    module, convolutions = getattr(owner, part), 0
    for path, child in module.named_modules():
        block = _BLOCK.search(f"{path}.")
        front = isinstance(child, _CONVOLUTIONS) and path != "downsample"  # which merges patches behind the blocks
        for key, parameter in child.named_parameters(recurse=False):
            if id(parameter) in unread:
                continue
            matrix = parameter.ndim >= 2 and not isinstance(child, nn.Embedding) and min(parameter.shape) > 0
            known = key == "weight" or key.endswith("projection_weight")
            active = parameter.numel() if matrix and known else 0
            if part == _PROJECTOR:
                place, depth = "features", _BEHIND
            elif block is not None:
                place, depth = "hidden", int(block[1])
            elif front:
                place, depth = f"conv{convolutions}", convolutions - 9
            elif path == "conv_out":
                place, depth = "hidden", -1
            else:
                position = isinstance(child, nn.Embedding) or (not active and "embed" in f"{path}.{key}")
                place, depth = "features", -1 if position or "token" in key else _BEHIND
            yield _Weight(place, depth, active, parameter.requires_grad)
        convolutions += front


def _attention(owner: Any, parts: Sequence[str], unread: set[int]) -> Iterator[tuple[int, int]]:
    """Yield the block and the forward FLOPs per pair of every attention of an encoder's blocks."""
    for part in parts:
        for path, module in getattr(owner, part).named_modules():
            block = _BLOCK.search(f"{path}.")
            if block is None or "Attention" not in type(module).__name__:
                continue
            linear = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
            output = next((linear[name] for name in _OUTPUTS if name in linear), None)
            if output is None or not linear.keys() - {*_OUTPUTS} <= _INPUTS:
                raise UncountableError(f"the attention of {part}.{path} is not understood")
            if id(output.weight) not in unread:
                yield int(block[1]), 4 * output.in_features
