"""How much memory a model's parameters, gradients and optimizer state take on each rank, from shapes alone."""

import torch
from torch import Tensor, nn

from veomni.models import derive_plan
from veomni.optim import OptimizerSection, hidden_matrices
from veomni.run_config.train import TrainSection
from veomni.strategies.transforms.precision import Precision, select_precision


def rank_memory(model: nn.Module, train: TrainSection, shards: int) -> dict[str, float]:
    """Return bytes on one rank by what takes them, without activations; parameters are spread over ``shards`` ranks.

    ``gathered`` are copies in the compute format: blocks gathered by FSDP (two at a time, all of them when they stay
    gathered; of the experts only the rank's own), or the weights that autocast keeps under ``single`` and ``ddp``.
    """
    precision = select_precision(train.precision)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    counts = {
        "parameters": _count(model), "gradients": trained, "optimizer": _optimizer_numbers(model, trained, train),
    }  # fmt: skip
    found = {name: count * precision.storage.itemsize / shards for name, count in counts.items()}
    return {**found, "gathered": _gathered(model, train, precision, shards)}


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


def _gathered(model: nn.Module, train: TrainSection, precision: Precision, shards: int) -> float:
    plan = derive_plan(model)
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
    options = train.strategy.arguments()
    stays = not options.get("reshard_after_forward", True) or options.get("sharding") == "grad_op"
    at_once = sum(sizes) if stays else max(sizes, default=0) * (1 + max(1, options.get("prefetch", 0)))
    return min(everything, everything - sum(sizes) + at_once) * precision.compute.itemsize


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
