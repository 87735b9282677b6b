"""Ulysses with its exchanges under the projections: q is exchanged while k is projected, and k while v is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from veomni.compat.collectives import group_key
from veomni.errors import ModelError
from veomni.ops.attention.ulysses import HEADS_EXCHANGED, check_heads, exchanges_heads, repeat_heads
from veomni.ops.comm.even_exchange import finish_exchange, start_exchange
from veomni.ops.comm.sequence_exchange import gather_heads_scatter_seq, gather_sequence
from veomni.ops.patch import PatchAttribute

_INPUTS = ("q_proj", "k_proj", "v_proj")
_PROJECTIONS = (*_INPUTS, "o_proj")
_NORMS = ("q_norm", "k_norm")
_FIX = "leave Ulysses.overlap out", "Ulysses.overlap"


def overlap_projections(model: nn.Module, group: ProcessGroup, patch: PatchAttribute) -> None:
    """Make every attention module of a text model, or of the text part of a larger one, exchange heads asynchronously.

    A module that is not of the standard form is a ModelError, which says why.
    """
    modules = attention_modules(model)
    for name, module in modules:
        reason = why_not_overlapped(module)
        if reason:
            raise ModelError(f"{name} ({type(module).__name__}) cannot overlap its exchanges: {reason}", *_FIX)
        _Overlapped(module, group, patch)
    for each in model.modules():
        if type(each).__name__.endswith("RotaryEmbedding"):
            patch(each, "forward", _whole_tables(each.forward, modules[0][1], group))


def attention_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the attention modules of a model: those with an output projection, or named attention and with parts."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "o_proj") or (type(module).__name__.endswith("Attention") and list(module.children()))
    ]


def why_not_overlapped(module: nn.Module) -> str | None:
    """Say why an attention module is not of the standard q/k/v/o form, or None if it is."""
    missing = [name for name in _PROJECTIONS if type(getattr(module, name, None)) is not nn.Linear]
    if missing:
        return f"it has no plain Linear called {', '.join(missing)}"
    others = [name for name, _ in module.named_children() if name not in (*_PROJECTIONS, *_NORMS)]
    others += [name for name, _ in module.named_parameters(recurse=False) if name != "sinks"]
    if others:
        return f"it has parts of its own: {', '.join(others)}"
    head_dim = getattr(module, "head_dim", None)
    if not isinstance(head_dim, int):
        return "it has no head_dim"
    for name in _NORMS:
        weights = [weight.numel() for weight in getattr(module, name, nn.Identity()).parameters()]
        if any(weight != head_dim for weight in weights):
            return f"its {name} normalises over all heads together"
    queries: nn.Linear = module.q_proj  # type: ignore[assignment]
    output: nn.Linear = module.o_proj  # type: ignore[assignment]
    if queries.out_features != output.in_features or queries.out_features % head_dim:
        return "its queries are not heads x head_dim (they are gated)"
    if "position_embeddings" not in inspect.signature(module.forward).parameters:
        return "its forward takes no position_embeddings"
    return None


class _Overlapped:
    """One attention module that exchanges asynchronously; it keeps its own forward.

    Queries, keys and values are projected from this rank's positions and sent as each is ready. Then the forward runs
    as if it held the whole row and a part of the heads: its projections return what was received. Its hidden states
    have the right shape and no values: what computes with them fails in the trial run of the set-up.
    """

    def __init__(self, module: nn.Module, group: ProcessGroup, patch: PatchAttribute) -> None:
        self.module, self.group, self.key = module, group, group_key(group)
        self.inner: Callable[..., Any] = module.forward
        self.names = list(inspect.signature(self.inner).parameters)
        self.project = {name: getattr(module, name).forward for name in _PROJECTIONS}
        for name in _INPUTS:
            patch(getattr(module, name), "forward", self._received(name))
        patch(module.o_proj, "forward", self._send_back)
        patch(module, "forward", self.forward)
        patch(module, HEADS_EXCHANGED, True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Attend as the module does; where another attention is in use (a probe), do nothing else."""
        if not exchanges_heads(self.module) or not self.key:  # reading the key guards a compiled graph
            return self.inner(*args, **kwargs)
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        hidden = arguments["hidden_states"]
        rooms = {name: self._start(name, self.project[name](hidden)) for name in _INPUTS}
        return self.inner(**{**arguments, "hidden_states": _InFlight(hidden, self.group.size(), rooms)})

    def _start(self, name: str, projected: Tensor) -> Tensor:
        heads, size = projected.unflatten(-1, (-1, self.module.head_dim)), self.group.size()
        if name == "q_proj":
            check_heads(heads.shape[2], size)
        shares = repeat_heads(heads, size).unflatten(2, (size, -1))
        return start_exchange(shares.permute(2, 0, 1, 3, 4), self.group)

    def _received(self, name: str) -> Callable[[Tensor | _InFlight], Tensor]:
        def forward(hidden: Tensor | _InFlight) -> Tensor:
            if isinstance(hidden, Tensor):
                projected: Tensor = self.project[name](hidden)
                return projected
            shares = finish_exchange(hidden.rooms[name], self.group)
            return shares.transpose(0, 1).flatten(1, 2).flatten(2)  # [batch, seq, heads / P * head_dim]

        return forward

    def _send_back(self, attended: Tensor) -> Tensor:
        if exchanges_heads(self.module):
            heads = attended.unflatten(-1, (-1, self.module.head_dim))
            attended = gather_heads_scatter_seq(heads, self.group).flatten(2)
        return self.project["o_proj"](attended)


class _InFlight:
    """Stands for the hidden states of whole rows; ``rooms`` are filled with their projections meanwhile."""

    def __init__(self, part: Tensor, size: int, rooms: dict[str, Tensor]) -> None:
        self.shape = (part.shape[0], part.shape[1] * size, part.shape[2])
        self.dtype, self.device = part.dtype, part.device
        self.rooms = rooms

    def size(self) -> tuple[int, ...]:
        return self.shape


def _whole_tables(forward: Callable[..., Any], attention: nn.Module, group: ProcessGroup) -> Callable[..., Any]:
    """Return a rotary embedding's forward with cosines and sines of whole rows, where ``attention`` exchanges heads.

    They are gathered once for all layers, and outside of them.
    """

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        tables = forward(*args, **kwargs)
        if not exchanges_heads(attention):
            return tables
        if not (isinstance(tables, tuple) and all(isinstance(table, Tensor) for table in tables)):
            raise ModelError("the model's rotary embedding is not a pair of cosines and sines", *_FIX)
        return tuple(gather_sequence(table, group, dim=-2) for table in tables)

    return run
