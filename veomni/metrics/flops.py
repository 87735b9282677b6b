"""FLOPs of a training step, from the model and the real lengths of its documents: what MFU is made of."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from veomni.logging import create_logger
from veomni.metrics.attention_shapes import UncountableError, attention_shapes
from veomni.metrics.encoder_flops import EncoderFlops, encoders_of
from veomni.models.adapter.passes.media import media_owner

logger = create_logger(__name__)

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


class StepFlops(NamedTuple):
    """Forward and backward FLOPs of one step, with attention counted in two ways; see :class:`FlopsCounter`."""

    causal: float
    full: float


class FlopsCounter:
    """Count the FLOPs of steps of one model, by conventions that compare with others'.

    - A multiply-add is 2 FLOPs. A backward is two forwards: the gradient of the input, and that of the weight.
    - Counted: products with every weight a token really meets (the head, tied or not; routers; shared experts; of the
      routed experts the ``top_k`` chosen ones), and attention's two products, scores and weighted sum.
    - Never counted: lookups in embeddings, norms, activations, the softmax, padding, recomputation.
    - ``causal`` counts the (query, key) pairs that the mask leaves, by document and window: a document of ``s`` tokens
      has ``s (s + 1) / 2``, the ``s^2 / 2`` of Megatron and NeMo plus the diagonal's other half.
    - ``full`` counts ``s^2`` pairs for every document and layer, as torchtitan and PaLM's appendix B do, without
      windows: where they are much shorter than documents it is more than any kernel computes.

    - Encoders of images, videos and audio are in both: :class:`~veomni.metrics.encoder_flops.EncoderFlops`.

    Args:
        linear: FLOPs per token, forward and backward, of all products with weights.
        attention: FLOPs per (query, key) pair, forward and backward, summed over the layers that share a window.
        encoders: Count what is in front of the language model.
    """

    def __init__(
        self, linear: float, attention: Mapping[int | None, float], encoders: Sequence[EncoderFlops] = ()
    ) -> None:
        self.linear, self.attention, self.encoders = linear, dict(attention), tuple(encoders)

    @classmethod
    def from_model(cls, model: nn.Module) -> Self | None:
        """Derive the counter of a transformers decoder, before it is sharded; the meta device will do.

        Freeze parameters before: a frozen weight needs no gradient of its own (2/3 of the FLOPs), and layers in front
        of the first one with a trained parameter run no backward at all (1/3). None, with one line in the log, is
        returned for a model with a part whose FLOPs are not known.
        """
        try:
            return cls._derive(model)
        except UncountableError as error:
            logger.warning_rank0("no FLOPs and no MFU for %s: %s", type(model).__name__, error)
            return None

    @classmethod
    def _derive(cls, model: nn.Module) -> Self:
        if not hasattr(model, "config") or not hasattr(model.config, "get_text_config"):
            raise UncountableError("it has no transformers configuration")
        config = model.config.get_text_config()  # type: ignore[operator]
        owner = media_owner(model)
        encoders, parts = ([], []) if owner is None else encoders_of(owner)
        elsewhere = {id(module) for part in parts for module in part.modules()}
        modules = {name: module for name, module in model.named_modules() if id(module) not in elsewhere}
        weights = list(_active_weights(modules, config))
        first = min((weight.depth for weight in weights if weight.trainable), default=None)
        if any(encoder.trains for encoder in encoders):
            first = -1  # gradients go through all layers to the encoder
        linear = sum(2 * weight.active * weight.passes(first) for weight in weights)
        attention: dict[int | None, float] = defaultdict(float)
        for shape in attention_shapes(modules, config):
            passes = 3 if first is not None and _depth_of(shape.name, outside=-1) >= first else 1
            attention[shape.window] += shape.flops_per_pair * passes
        return cls(float(linear), attention, encoders)

    def step_flops(
        self, document_lengths: Sequence[int] | Tensor, media: Sequence[Mapping[str, Any]] = ()
    ) -> StepFlops:
        """Return the FLOPs of a step over documents of these lengths, int64 ``[documents]`` on the CPU, unpadded.

        ``media`` are the inputs of its micro-batches, which have the sizes of images, videos and audio.
        """
        lengths = torch.as_tensor(document_lengths, dtype=torch.int64)
        linear = self.linear * int(lengths.sum())
        causal = sum(flops * causal_pairs(lengths, window) for window, flops in self.attention.items())
        full = sum(self.attention.values()) * int((lengths * lengths).sum())
        encoded = sum(encoder.step_flops(media) for encoder in self.encoders)
        return StepFlops(causal=linear + causal + encoded, full=linear + full + encoded)


def causal_pairs(lengths: Tensor, window: int | None) -> int:
    """Count the (query, key) pairs of documents, int64 ``[documents]``; a query sees ``window`` keys with its own."""
    head = lengths if window is None else lengths.clamp(max=window)
    beyond = 0 if window is None else (lengths - head) * window
    return int((head * (head + 1) // 2 + beyond).sum())


class _ActiveWeight(NamedTuple):
    depth: int  # the layer it belongs to; -1 in front of the layers, their number behind them
    active: int  # its numbers that one token is multiplied with; 0 for lookups, norms and biases
    trainable: bool

    def passes(self, first: int | None) -> int:
        """Forward, gradient of the input where anything in front or beside is trained, gradient of the weight."""
        return 1 + (first is not None and self.depth >= first) + self.trainable


def _depth_of(name: str, outside: int) -> int:
    index = _INDEX.search(name)
    return int(index.group(1)) if index else outside


def _active_weights(modules: Mapping[str, nn.Module], config: Any) -> Iterator[_ActiveWeight]:
    """Yield every module's own parameters, a tied one once for each module that uses it."""
    outside = -1
    for path, module in modules.items():
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{key}" if path else key
            depth = _depth_of(name, outside)
            outside = config.num_hidden_layers if depth >= 0 else outside
            yield _ActiveWeight(depth, _active(name, module, tuple(parameter.shape), config), parameter.requires_grad)


def _active(name: str, module: nn.Module, shape: tuple[int, ...], config: Any) -> int:
    key = name.rpartition(".")[2]
    if len(shape) < 2 or isinstance(module, nn.Embedding) or key.endswith("bias"):
        return 0
    count, used = expert_counts(config)
    stacked = len(shape) == 3 and shape[0] == count
    if not stacked and (len(shape) != 2 or key != "weight"):
        raise UncountableError(f"it has a parameter {name} of shape {list(shape)}")
    if not stacked and not re.search(r"\bexperts\.\d+\.", name):
        return shape[0] * shape[1]
    if used is None or count is None:
        missing = "a token uses" if used is None else "there are"
        raise UncountableError(f"its configuration does not say how many experts {missing}, of which {name} is one")
    return shape[-2] * shape[-1] * used // (1 if stacked else count)  # stacked, or one module per expert


def expert_counts(config: Any) -> tuple[int | None, int | None]:
    """Return the experts of a layer of a transformers configuration, and the experts per token; None if not given."""
    return _first(config, _EXPERT_COUNTS), _first(config, _EXPERTS_PER_TOKEN)


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)
