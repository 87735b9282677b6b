"""How much memory a model's parameters, gradients and optimizer state take on each rank, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from veomni.optim import OptimizerSection, hidden_matrices
from veomni.parallel.plan import ParallelPlan
from veomni.strategies.transforms.precision import Precision

if TYPE_CHECKING:
    from veomni.loop.section import TrainSection


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank, activations not counted.

    Attributes:
        parameters: Master weights.
        gradients: Gradients, in the master weights' format.
        optimizer: Optimizer state.
        gathered: Copies in the compute format that exist besides: blocks gathered by FSDP (two at a time, all of them
            when they stay gathered; of the experts only the rank's own), or the weights that autocast keeps under
            ``single`` and ``ddp``.
    """

    parameters: float
    gradients: float
    optimizer: float
    gathered: float

    @property
    def total(self) -> float:
        """The sum of all."""
        return self.parameters + self.gradients + self.optimizer + self.gathered


def rank_memory(
    model: nn.Module, plan: ParallelPlan, train: TrainSection, precision: Precision, shards: int
) -> RankMemory:
    """Return the memory of one rank.

    Args:
        model: The model; the meta device will do.
        plan: Its blocks, which are gathered one at a time, and its experts.
        train: The section ``train`` of the configuration.
        precision: The number formats.
        shards: Ranks that each parameter is spread over.
    """
    everything = _count(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    item = precision.storage.itemsize
    return RankMemory(
        parameters=everything * item / shards,
        gradients=trained * item / shards,
        optimizer=_optimizer_numbers(model, trained, train) * item / shards,
        gathered=_gathered(model, plan, train, precision, shards),
    )


def _optimizer_numbers(model: nn.Module, trained: int, train: TrainSection) -> int:
    """Return how many numbers the optimizer keeps: two a parameter (AdamW), one (momentum), or none."""
    section = train.optimizer
    if section.chosen == "muon":
        matrices = hidden_matrices(model, exclude=section.arguments()["exclude"])
        return 2 * trained - sum(matrix.numel() for matrix in matrices)
    return round(trained * _state_per_parameter(section))


def _state_per_parameter(section: OptimizerSection) -> float:
    """Return how many numbers a step leaves per parameter, found by taking one on a small layer."""
    layer = nn.Linear(32, 32, bias=False)
    optimizer = section.model_copy(update={"no_decay": [], "lr_scale": {}}).build(layer)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    kept = [value for value in optimizer.state[layer.weight].values() if isinstance(value, Tensor) and value.ndim]
    return sum(value.numel() for value in kept) / layer.weight.numel()


def _gathered(model: nn.Module, plan: ParallelPlan, train: TrainSection, precision: Precision, shards: int) -> float:
    elsewhere = 1 - 1 / train.expert_parallel_size  # the share of the experts that other ranks hold
    experts = {name: elsewhere * _count(model.get_submodule(name)) for name in plan.experts}
    everything = _count(model) - sum(experts.values())
    if train.data_parallel_mode in ("single", "ddp"):
        return everything * precision.compute.itemsize if precision.mixed else 0
    if shards == 1 and not precision.mixed:
        return 0
    sizes = [
        _count(model.get_submodule(block)) - sum(size for name, size in experts.items() if name.startswith(f"{block}."))
        for block in plan.blocks
    ]
    root = everything - sum(sizes)
    options = train.strategy.arguments()
    stays = not options.get("reshard_after_forward", True) or options.get("sharding") == "grad_op"
    at_once = sum(sizes) if stays else max(sizes, default=0) * (1 + max(1, options.get("prefetch", 0)))
    return min(everything, root + at_once) * precision.compute.itemsize


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
