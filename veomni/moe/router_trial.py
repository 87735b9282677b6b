"""What a router returns and can do, found by running a copy of it.

The copy has random weights and is run on random hidden states; that shows it for any model, without a table of them.
"""

import inspect
import math
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veomni.compat.modules import clear_hooks
from veomni.models.transformers_api.experts import balances_on_softmax
from veomni.moe.scoring import ScoreFunction, Scoring, find_scoring

_TOKENS = 512
_LARGE = 1e3  # more than any score


@dataclass(frozen=True)
class RouterFinding:
    """What is the same for all routers of one kind, which choose ``top_k`` of so many ``experts`` for a token.

    ``positions`` are where in the output logits, weights and indices are; ``scoring``, how weights come from logits
    (None where no known formula gives them); ``balance``, what a load-balancing loss averages over tokens (None where
    none is defined). ``bias_path`` is the module with the correction bias, by its path inside the router or None for
    the block around it, and the bias' name; None without one.
    """

    experts: int
    top_k: int
    positions: tuple[int, int, int]
    scoring: Scoring | None
    balance: ScoreFunction | None
    bias_path: tuple[str | None, str] | None


def kind_of(module: nn.Module, block: nn.Module, logits_at: int) -> Any:
    """Return a key that is equal for routers which behave alike: class, tensors and numbers."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    shapes = tuple((name, tuple(tensor.shape), tensor.requires_grad) for name, tensor in tensors)
    plain = (item for item in vars(module).items() if isinstance(item[1], bool | int | float | str))
    return type(module), type(block), shapes, logits_at, tuple(sorted(item for item in plain if item[0] != "layer_idx"))


def examine_router(model: nn.Module, module: nn.Module, block: nn.Module, logits_at: int) -> RouterFinding | None:
    """Run a copy of a router and return what was found, or None where its decisions cannot be read.

    The transformers model is not changed; its parameters may be on the meta device. ``block`` holds the router, whose
    logits are at ``logits_at`` in its output.
    """
    copy = _Copy(module)
    output = copy.run()
    positions = _positions(output, logits_at) if isinstance(output, tuple) else None
    if positions is None:
        return None
    logits, weights, indices = (output[position] for position in positions)
    scoring = find_scoring(logits, weights, indices, _numbers(module))
    if scoring is None and bool((weights == 0).any()):
        return None  # a choice that is taken back after it was made: where a token goes does not show outside
    function: ScoreFunction | None = None if scoring is None else scoring.function
    if function is None and balances_on_softmax(model):
        function = "softmax"
    bias = _find_bias(block, copy, output, positions)
    return RouterFinding(logits.shape[-1], indices.shape[-1], positions, scoring, function, bias)


def _positions(output: tuple[Any, ...], logits_at: int) -> tuple[int, int, int] | None:
    matrices = {place: value for place, value in enumerate(output) if isinstance(value, Tensor) and value.dim() == 2}
    matrices.pop(logits_at, None)
    for indices_at, indices in matrices.items():
        if not indices.is_floating_point():
            for weights_at, weights in matrices.items():
                if weights.is_floating_point() and weights.shape == indices.shape:
                    return logits_at, weights_at, indices_at
    return None


def _numbers(module: nn.Module) -> list[float]:
    numbers = (value for value in vars(module).values() if isinstance(value, int | float))
    return [float(value) for value in numbers if math.isfinite(value) and value > 0]


class _Copy:
    """A copy of a router on the CPU, in float32, with random weights and without hooks."""

    def __init__(self, module: nn.Module) -> None:
        self.module = deepcopy(module).to_empty(device="cpu").float().eval()
        clear_hooks(self.module)
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

    def bias_arguments(self) -> list[str]:
        """Names of the correction bias among the arguments of the forward, where the block above holds it."""
        return [name for name in inspect.signature(self.module.forward).parameters if "bias" in name]

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
            except Exception:  # noqa: S112  (any failure means: unsupported router)
                continue
        return None


def _find_bias(
    block: nn.Module, copy: _Copy, before: Any, positions: tuple[int, int, int]
) -> tuple[str | None, str] | None:
    """Return where the tensor is that adds to the scores for the choice, and changes neither logits nor weights."""
    logits_at, _, indices_at = positions
    experts = before[logits_at].shape[-1]
    large = torch.zeros(experts)
    large[-1] = _LARGE

    def decides(after: Any) -> bool:
        chosen = bool((after[indices_at] == experts - 1).any(-1).all())
        return chosen and torch.equal(after[logits_at], before[logits_at])

    for argument in copy.bias_arguments():
        if isinstance(getattr(block, argument, None), Tensor) and decides(copy.run(**{argument: large})):
            return None, argument
    for path in [*(path for path, _ in copy.module.named_buffers()), *copy.bias_names()]:
        owner, _, attribute = path.rpartition(".")
        candidate = getattr(copy.module.get_submodule(owner), attribute)
        if candidate.numel() != experts or not candidate.is_floating_point():
            continue
        candidate.data.copy_(large.view_as(candidate))
        found = decides(copy.run())
        candidate.data.zero_()
        if found:
            return owner, attribute
    return None
