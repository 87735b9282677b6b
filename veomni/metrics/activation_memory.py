"""The device memory of activations, by arithmetic: the longest row that fits, and what to recompute so that one does.

Elements of the compute format are counted per token for compiled blocks: ``H`` hidden channels, ``Q`` and ``K``
channels of queries and of keys, ``M`` channels between the products of a dense MLP (three times the intermediate size
of a gated one); for experts, ``k`` of them per token with intermediate size ``I``. ``docs/long_rows.md`` derives each
number and compares the sums with measured peaks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

from torch import nn

from veomni.errors import ConfigError
from veomni.metrics.flops import expert_counts
from veomni.models.traits.tokenwise import find_mlps
from veomni.ops.experts.exchange import ranks_of_token
from veomni.ops.host_stack import IN_FLIGHT
from veomni.ops.loss.cross_entropy import CHUNK_ELEMENTS
from veomni.parallel.plan import ParallelPlan

_SIZES = ("num_attention_heads", "num_hidden_layers", "hidden_size", "vocab_size")
_DERIVED = ("head_dim", "num_key_value_heads", "num_experts_per_tok")  # or not given at all
_TILE_COPIES = 3  # a tile's channels, their gradients, and what one operation makes of both


class ActivationPolicy(NamedTuple):
    """What is recomputed, offloaded to host memory and tiled; ``tile`` is the tokens of an MLP's tile."""

    recompute: Literal["none", "selective", "full"] = "none"
    offload: bool = False
    tile: int | None = None

    def __str__(self) -> str:
        return self.recompute + " + offload" * self.offload + f" + MLP in tiles of {self.tile}" * bool(self.tile)


_FIX = "choose recomputation yourself: ActivationCheckpointing, TiledMLP"
_TILE = 8192  # tokens of a tile where a budget chooses them
_POLICIES = (
    ActivationPolicy(), ActivationPolicy("selective"), ActivationPolicy("full"),
    ActivationPolicy("full", offload=True), ActivationPolicy("full", offload=True, tile=_TILE),
)  # fmt: skip


class ExpertChannels(NamedTuple):
    """Elements of experts for each token of a rank (``ops/experts/fused.py``); all 0 without experts.

    ``product`` is their first product, ``2 k I``, and ``received`` are the hidden states from the ranks that share the
    experts, both kept for the backward; ``gradients`` are what the backward of the second product makes at once,
    ``k (4 I + H)``.
    """

    product: int = 0
    received: float = 0.0
    gradients: int = 0

    @property
    def kept(self) -> float:
        """Elements that are kept from the forward to the backward."""
        return self.product + self.received


@dataclass(frozen=True)
class ActivationMemory:
    """The sizes of a model that its activations depend on; bytes are those of one rank.

    Attributes:
        queries: Channels over all query heads; ``keys`` those over all key heads.
        mlp: Channels between the products of a block's largest dense MLP.
        experts: Those of a block's experts.
        itemsize: Bytes of an element of the compute format.
    """

    layers: int
    hidden: int
    queries: int
    keys: int
    mlp: int
    experts: ExpertChannels
    vocabulary: int
    itemsize: int

    @classmethod
    def of(
        cls, model: nn.Module, plan: ParallelPlan, itemsize: int, *, expert_ranks: int = 1, fixed_exchange: bool = False
    ) -> Self:
        """Read the sizes of a transformers decoder, before its parameters are sharded.

        ``expert_ranks`` share the experts of a layer; ``fixed_exchange`` is ``ExpertParallel(exchange="fixed")``.

        Raises:
            ConfigError: The model is no transformers decoder.
        """
        config: Any = getattr(model, "config", None)
        text: Any = config.get_text_config() if hasattr(config, "get_text_config") else None
        mlp = max(_mlp_channels(model, plan), default=0)
        counted = [getattr(text, name, None) for name in _SIZES] + ([] if plan.experts else [mlp or None])
        counted += [getattr(text, name, None) or 1 for name in _DERIVED]
        if not plan.blocks or not all(isinstance(size, int) for size in counted):
            problem = f"the activations of {type(model).__name__} are not counted: it is no decoder of a known kind"
            raise ConfigError(problem, _FIX, "ActivationBudget.memory")
        heads: int = text.num_attention_heads
        head: int = getattr(text, "head_dim", None) or text.hidden_size // heads
        keys: int = getattr(text, "num_key_value_heads", None) or heads
        return cls(
            layers=text.num_hidden_layers, hidden=text.hidden_size, queries=heads * head, keys=keys * head,
            mlp=mlp, vocabulary=text.vocab_size, itemsize=itemsize,
            experts=_experts(text, expert_ranks, fixed_exchange) if plan.experts else ExpertChannels(),
        )  # fmt: skip

    @property
    def policies(self) -> tuple[ActivationPolicy, ...]:
        """The policies of this model, fastest first: each takes less memory than the one before."""
        return _POLICIES if self.mlp else _POLICIES[:-1]

    def bytes(
        self, tokens: int, policy: ActivationPolicy, gradients: float = 0.0, *, accumulated: bool = False
    ) -> float:
        """Return the peak in bytes of a forward and backward over ``tokens``, with ``gradients`` bytes of parameters.

        Gradients of blocks are made while what the forward kept is freed, unless they are ``accumulated`` from earlier
        micro-batches.
        """
        inputs = self.hidden if policy.offload else 0
        kept, scale = self._kept(policy), tokens * self.itemsize
        first = (self.layers * (kept - inputs) + min(self.layers, IN_FLIGHT + 1) * inputs) * scale
        held = gradients + first if accumulated else max(first, gradients + kept * scale)
        at_once = max(self._block(tokens, policy) * self.itemsize, self._head(tokens))
        head = self.vocabulary * self.hidden * self.itemsize  # its gradient, until it is reduced
        return held + at_once + head

    def longest(
        self, memory: float, policy: ActivationPolicy, gradients: float = 0.0, *, accumulated: bool = False
    ) -> int:
        """Return the most tokens that fit into ``memory`` bytes, a multiple of 1024; 0 where that many do not fit."""
        low, high = 0, 1 << 16
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.bytes(1024 * middle, policy, gradients, accumulated=accumulated) <= memory
            low, high = (middle, high) if fits else (low, middle)
        return 1024 * low

    def _saved(self, policy: ActivationPolicy) -> float:
        """Return the elements per token that a block's backward reads: residuals, norms, attention, MLP, experts."""
        attention = 3 * self.queries + 3 * self.keys  # before and after norm and rotation, and the result
        return 4 * self.hidden + attention + (0 if policy.tile else self.mlp) + self.experts.kept

    def _kept(self, policy: ActivationPolicy) -> float:
        """Return the elements per token that a block keeps from its forward to its backward."""
        if policy.recompute == "none":
            return self._saved(policy)
        if policy.recompute == "full":
            return self.hidden
        dense = 0 if policy.tile else self.mlp * 2 / 3
        products = self.queries + 2 * self.keys + self.hidden + dense  # every second one is kept
        return self.hidden + self.queries + products / 2 + self.experts.product

    def _block(self, tokens: int, policy: ActivationPolicy) -> float:
        """Return the elements of one block's backward besides what was kept: what is recomputed, and gradients."""
        again, dense = self._saved(policy) - self._kept(policy), 0 if policy.tile else self.mlp
        in_mlp = 2 * self.hidden + dense + self.experts.gradients
        # By then what the MLP saved is freed; kernels sum the gradient of queries in float32.
        in_attention = 4 * self.queries + 3 * self.keys - dense - self.experts.kept
        tile = _TILE_COPIES * min(tokens, policy.tile or 0) * self.mlp
        return tokens * (again + max(in_mlp, in_attention)) + tile

    def _head(self, tokens: int) -> float:
        """Return the bytes of the last norm, which is not compiled, and of the loss, whose logits exist in chunks."""
        norm = tokens * self.hidden * (3 * 4 + 4 * self.itemsize)
        logits = min(CHUNK_ELEMENTS, tokens * self.vocabulary) * self.itemsize
        return norm + logits + self.vocabulary * self.hidden * 4


def _experts(text: Any, ranks: int, fixed: bool) -> ExpertChannels:
    count, top_k = expert_counts(text)
    width = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None)
    if count is None or top_k is None or not isinstance(width, int):
        problem = f"the activations of {type(text).__name__} are not counted: it does not give its experts' sizes"
        raise ConfigError(problem, _FIX, "ActivationBudget.memory")
    rows = ranks * min(top_k, count // ranks) if fixed else top_k
    received = 0.0 if ranks == 1 else ranks_of_token(count, top_k, ranks, fixed=fixed) * text.hidden_size
    return ExpertChannels(2 * rows * width, received, rows * (4 * width + text.hidden_size))


def _mlp_channels(model: nn.Module, plan: ParallelPlan) -> Iterator[int]:
    """Yield, for each dense MLP, the channels that are not those of its input."""
    for name in find_mlps(model, plan):
        layers = [each for each in model.get_submodule(name).modules() if isinstance(each, nn.Linear)]
        outside = layers[0].in_features
        yield sum(size for each in layers for size in (each.in_features, each.out_features) if size != outside)
