"""What activations take of a device, by arithmetic: the row that fits, and what to recompute so that one does.

Bytes are counted per token for compiled blocks, in elements of the format of compute: ``H`` hidden channels, ``Q`` and
``K`` channels of queries and of keys, ``M`` channels between the products of an MLP (three times the intermediate size
of a gated one). ``docs/long_rows.md`` derives each number, and says what they were compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

from torch import nn

from veomni.accelerators.host_stack import IN_FLIGHT
from veomni.errors import ConfigError
from veomni.models.traits.tokenwise import find_mlps
from veomni.ops.loss.cross_entropy import CHUNK_ELEMENTS
from veomni.parallel.plan import ParallelPlan

_SIZES = ("num_attention_heads", "num_hidden_layers", "hidden_size", "vocab_size")
_DERIVED = ("head_dim", "num_key_value_heads", "num_experts_per_tok")  # or not given at all
_TILE_COPIES = 3  # a tile's channels, their gradients, and what one operation makes of both


class Rung(NamedTuple):
    """One way to keep activations, from the cheapest to the leanest; ``tile`` is the tokens of an MLP's tile."""

    recompute: Literal["none", "selective", "full"] = "none"
    offload: bool = False
    tile: int | None = None

    def __str__(self) -> str:
        return self.recompute + " + offload" * self.offload + f" + MLP in tiles of {self.tile}" * bool(self.tile)


TILE = 8192
"""Tokens of a tile where a budget chooses them."""
_LADDER = (Rung(), Rung("selective"), Rung("full"), Rung("full", True), Rung("full", True, TILE))


@dataclass(frozen=True)
class ActivationMemory:
    """The sizes of a model that its activations depend on; bytes are those of one rank.

    ``queries`` and ``keys`` are channels over all heads, ``mlp`` those between the products of the largest block's
    dense MLPs, ``routed`` those of the experts that a token is sent to, ``itemsize`` the bytes of a number of compute.
    """

    layers: int
    hidden: int
    queries: int
    keys: int
    mlp: int
    routed: int
    vocabulary: int
    itemsize: int

    @classmethod
    def of(cls, model: nn.Module, plan: ParallelPlan, itemsize: int) -> Self:
        """Read the sizes of a transformers decoder, before it is sharded; ConfigError for another model."""
        config: Any = getattr(model, "config", None)
        text: Any = config.get_text_config() if hasattr(config, "get_text_config") else None
        mlp = max(_mlp_channels(model, plan), default=0)
        width = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None)
        counted = [getattr(text, name, None) for name in _SIZES] + [width if plan.experts else mlp or None]
        counted += [getattr(text, name, None) or 1 for name in _DERIVED]
        if not plan.blocks or not all(isinstance(size, int) for size in counted):
            problem = f"the activations of {type(model).__name__} are not counted: it is no decoder of the known kind"
            field = "ActivationBudget.memory"
            raise ConfigError(problem, "choose recomputation yourself: ActivationCheckpointing, TiledMLP", field)
        heads: int = text.num_attention_heads
        head: int = getattr(text, "head_dim", None) or text.hidden_size // heads
        keys: int = getattr(text, "num_key_value_heads", None) or heads
        used: int = getattr(text, "num_experts_per_tok", None) or 0
        return cls(
            layers=text.num_hidden_layers, hidden=text.hidden_size, queries=heads * head, keys=keys * head,
            mlp=mlp, routed=3 * used * (width or 0) if plan.experts else 0,
            vocabulary=text.vocab_size, itemsize=itemsize,
        )  # fmt: skip

    @property
    def ladder(self) -> tuple[Rung, ...]:
        """Ways to keep activations, the cheapest first."""
        return _LADDER if self.mlp else _LADDER[:-1]

    def bytes(self, tokens: int, rung: Rung, gradients: float = 0.0, *, accumulated: bool = False) -> float:
        """Return the most that a forward and backward over ``tokens`` take at once, with ``gradients`` of parameters.

        Those of blocks are made while what the forward kept goes, unless they are ``accumulated`` from earlier ones.
        """
        inputs = self.hidden if rung.offload else 0
        kept, scale = self._kept(rung), tokens * self.itemsize
        first = (self.layers * (kept - inputs) + min(self.layers, IN_FLIGHT + 1) * inputs) * scale
        held = gradients + first if accumulated else max(first, gradients + kept * scale)
        at_once = max(self._block(tokens, rung) * self.itemsize, self._head(tokens))
        return held + at_once + self.vocabulary * self.hidden * self.itemsize  # the head's gradient waits in its format

    def longest(self, memory: float, rung: Rung, gradients: float = 0.0, *, accumulated: bool = False) -> int:
        """Return the most tokens that take ``memory`` bytes, in thousands of 1024; 0 where none do."""
        low, high = 0, 1 << 16
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.bytes(1024 * middle, rung, gradients, accumulated=accumulated) <= memory
            low, high = (middle, high) if fits else (low, middle)
        return 1024 * low

    def _saved(self, rung: Rung) -> int:
        """Elements per token that the backward of a block reads: residuals and norms, attention, what is in the MLP."""
        attention = 3 * self.queries + 3 * self.keys  # before and behind norm and rotation, and the result
        return 4 * self.hidden + attention + self._inner(rung)

    def _kept(self, rung: Rung) -> float:
        """Elements per token and block from forward to backward."""
        if rung.recompute == "none":
            return self._saved(rung)
        if rung.recompute == "full":
            return self.hidden
        products = self.queries + 2 * self.keys + self.hidden + self._inner(rung) * 2 / 3  # every second one is kept
        return self.hidden + self.queries + products / 2

    def _block(self, tokens: int, rung: Rung) -> float:
        """Elements in one block's backward beside what was kept: what is made again, and gradients."""
        again, inner = self._saved(rung) - self._kept(rung), self._inner(rung)
        in_mlp = 2 * self.hidden + inner
        in_attention = 4 * self.queries + 3 * self.keys - inner  # the MLP's are gone; kernels sum queries in float32
        tile = _TILE_COPIES * min(tokens, rung.tile or 0) * self.mlp
        return tokens * (again + max(in_mlp, in_attention)) + tile

    def _inner(self, rung: Rung) -> int:
        return self.routed + (0 if rung.tile else self.mlp)

    def _head(self, tokens: int) -> float:
        """Bytes of the last norm, which is not compiled, and of the loss, whose logits exist in chunks."""
        norm = tokens * self.hidden * (3 * 4 + 4 * self.itemsize)
        logits = min(CHUNK_ELEMENTS, tokens * self.vocabulary) * self.itemsize
        return norm + logits + self.vocabulary * self.hidden * 4


def _mlp_channels(model: nn.Module, plan: ParallelPlan) -> Iterator[int]:
    """Yield, for each dense MLP, the channels that are not those of its input."""
    for name in find_mlps(model, plan):
        layers = [each for each in model.get_submodule(name).modules() if isinstance(each, nn.Linear)]
        outside = layers[0].in_features
        yield sum(size for each in layers for size in (each.in_features, each.out_features) if size != outside)
