"""The routers of a model: where they are, how they score, and whether they have a correction bias.

transformers says which modules record ``router_logits``. Each is copied, given random weights and run on random hidden
states: that shows what it returns and what it can do, for any model, without a table of them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veomni.models.transformers_api.experts import balances_on_softmax, router_logits
from veomni.moe.scoring import ScoreFunction, Scoring, find_scoring

_TOKENS = 512
_LARGE = 1e3  # more than any score


@dataclass(frozen=True)
class Routing:
    """What a router decided for its tokens.

    Attributes:
        logits: ``[tokens, experts]``.
        weights: ``[tokens, top_k]``.
        indices: int64 ``[tokens, top_k]``, the experts that each token is sent to.
    """

    logits: Tensor
    weights: Tensor
    indices: Tensor


class Listener:
    """Sees the decisions of routers, and may change what follows from them; as it stands it does neither."""

    def choose(self, router: Router, routing: Routing) -> Tensor | None:
        """Return the experts that tokens are sent to instead, int64 ``[tokens, top_k]``."""
        return None

    def see(self, router: Router, routing: Routing, training: bool) -> None:
        """Take note of a decision; ``training`` tells whether gradients will be asked for."""
        return

    def gradient(self, router: Router, logits: Tensor) -> Tensor | None:
        """Return what a loss on the logits adds to their gradient, ``[tokens, experts]``; called in the backward."""
        return None


@dataclass(frozen=True, eq=False)
class Router:
    """One router of a model.

    Attributes:
        name: Its name in the model.
        module: The module.
        experts: How many experts it chooses from.
        top_k: How many it chooses for a token.
        positions: Where in its output logits, weights and indices are.
        scoring: How weights come from logits; None where no known formula gives them.
        balance: What a load-balancing loss averages over tokens; None where nobody has defined one.
        bias: The module that has the correction bias and the bias' name in it; None without one.
        listeners: Who sees every decision of a watched router, in this order.
    """

    name: str
    module: nn.Module
    experts: int
    top_k: int
    positions: tuple[int, int, int]
    scoring: Scoring | None
    balance: ScoreFunction | None
    bias: tuple[nn.Module, str] | None
    listeners: list[Listener] = field(default_factory=list)


@dataclass(frozen=True)
class Routers:
    """The routers of a model.

    Attributes:
        readable: Those whose decisions can be read, in the order of the model.
        unreadable: The names of the others.
    """

    readable: tuple[Router, ...]
    unreadable: tuple[str, ...]


def find_routers(model: nn.Module) -> Routers:
    """Return the routers of a transformers model; its parameters may be on the meta device, and are not sharded yet."""
    readable, unreadable = [], []
    for name, module, logits_at in list(router_logits(model)) or _beside_experts(model):
        router = _inspect(model, name, module, logits_at)
        if router is None:
            unreadable.append(name)
        else:
            readable.append(router)
    return Routers(tuple(readable), tuple(unreadable))


def _beside_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield the routers of models whose ``router_logits`` no record is kept of: next to a module called ``experts``."""
    for name, block in model.named_modules():
        children = dict(block.named_children())
        for kind in ("gate", "router") if "experts" in children else ():
            if kind in children:
                yield f"{name}.{kind}", children[kind], 0


def _inspect(model: nn.Module, name: str, module: nn.Module, logits_at: int) -> Router | None:
    trial = _Trial(module)
    output = trial.run()
    if not isinstance(output, tuple):
        return None
    positions = _positions(output, logits_at)
    if positions is None:
        return None
    logits, weights, indices = (output[position] for position in positions)
    scoring = find_scoring(logits, weights, indices, _numbers(module))
    if scoring is None and bool((weights == 0).any()):
        return None  # a choice that is taken back after it was made: nobody outside can tell where the token went
    function: ScoreFunction | None = None if scoring is None else scoring.function
    if function is None and balances_on_softmax(model):
        function = "softmax"
    bias = _find_bias(model, name, module, trial, positions)
    return Router(name, module, logits.shape[-1], indices.shape[-1], positions, scoring, function, bias)


def _positions(output: tuple[Any, ...], logits_at: int) -> tuple[int, int, int] | None:
    def places(integer: bool, shape: torch.Size | None) -> Iterator[int]:
        for place, value in enumerate(output):
            if not isinstance(value, Tensor) or value.dim() != 2 or place == logits_at:
                continue
            if value.is_floating_point() != integer and (shape is None or value.shape == shape):
                yield place

    indices_at = next(places(True, None), None)
    if indices_at is None:
        return None
    weights_at = next(places(False, output[indices_at].shape), None)
    return None if weights_at is None else (logits_at, weights_at, indices_at)


def _numbers(module: nn.Module) -> list[float]:
    numbers = (value for value in vars(module).values() if isinstance(value, int | float))
    return [float(value) for value in numbers if math.isfinite(value) and value > 0]


class _Trial:
    """A copy of a router on the CPU, in float32, with random weights."""

    def __init__(self, module: nn.Module) -> None:
        self.module = deepcopy(module).to_empty(device="cpu").float().eval()
        for part in self.module.modules():  # hooks were made for the model's own forwards
            part._forward_hooks.clear()
            part._forward_pre_hooks.clear()
        generator = torch.Generator().manual_seed(0)
        for parameter in self.module.parameters():
            width = parameter.shape[-1] if parameter.dim() > 1 else 100
            parameter.data = torch.randn(parameter.shape, generator=generator, device="cpu") / width**0.5
        for buffer in self.module.buffers():
            buffer.zero_()
        for name in self.bias_names():
            self.module.get_parameter(name).data.zero_()

    def bias_names(self) -> list[str]:
        """Names of parameters that are a bias which is not trained."""
        found = self.module.named_parameters()
        return [name for name, parameter in found if "bias" in name and not parameter.requires_grad]

    @torch.no_grad()
    def run(self, **values: Tensor) -> Any:
        """Return the output on fixed random hidden states, None if it cannot be run; ``values`` are more arguments."""
        matrix = next((p for p in self.module.parameters() if p.dim() == 2), None)
        if matrix is None:
            return None
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(_TOKENS, matrix.shape[-1], generator=generator, device="cpu")
        extra = {**dict.fromkeys(self.bias_arguments(), torch.zeros(matrix.shape[0])), **values}
        for shaped in (hidden, hidden[None]):
            try:
                return self.module(shaped.clone(), **extra)
            except Exception:  # noqa: S112  (whatever a router raises, it is one that cannot be read)
                continue
        return None

    def bias_arguments(self) -> list[str]:
        """Names of the correction bias among the arguments of the forward, where the block above holds it."""
        return [name for name in inspect.signature(self.module.forward).parameters if "bias" in name]


def _find_bias(
    model: nn.Module, name: str, module: nn.Module, trial: _Trial, positions: tuple[int, int, int]
) -> tuple[nn.Module, str] | None:
    """Return where the tensor is that adds to the scores for the choice, and changes neither logits nor weights."""
    logits_at, _, indices_at = positions
    before = trial.run()
    experts = before[logits_at].shape[-1]
    large = torch.zeros(experts)
    large[-1] = _LARGE

    def decides(after: Any) -> bool:
        chosen = bool((after[indices_at] == experts - 1).any(-1).all())
        return chosen and torch.equal(after[logits_at], before[logits_at])

    block = model.get_submodule(name.rpartition(".")[0])
    for argument in trial.bias_arguments():
        if isinstance(getattr(block, argument, None), Tensor) and decides(trial.run(**{argument: large})):
            return block, argument
    for path in [*(path for path, _ in trial.module.named_buffers()), *trial.bias_names()]:
        owner_path, _, attribute = path.rpartition(".")
        candidate = getattr(trial.module.get_submodule(owner_path), attribute)
        if candidate.numel() != experts or not candidate.is_floating_point():
            continue
        candidate.data.copy_(large.view_as(candidate))
        found = decides(trial.run())
        candidate.data.zero_()
        if found:
            return module.get_submodule(owner_path), attribute
    return None
