"""The memory of a rank by arithmetic: parameters, gradients and optimizer state, and the rows that fit besides."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from veomni.metrics.activation_memory import ActivationPolicy
from veomni.models import derive_plan
from veomni.optim import OptimizerSection, hidden_matrices
from veomni.run_config.train import TrainSection
from veomni.strategies import ActivationBudget, ActivationCheckpointing, TiledMLP
from veomni.strategies.transforms.activation_budget import choose
from veomni.strategies.transforms.precision import Precision, select_precision


def rank_memory(model: nn.Module, train: TrainSection, shards: int) -> dict[str, float]:
    """Return the bytes on one rank by kind, without activations; parameters are sharded over ``shards`` ranks.

    ``gathered`` are copies in the compute format: units gathered by FSDP (two blocks at a time, or one and an embedding
    or head; all of them when they stay gathered; of the experts only the rank's own), or the weights that autocast
    keeps under ``single`` and ``ddp``.
    """
    precision = select_precision(train.precision)
    trained, size = count_parameters(model, trained=True), precision.storage.itemsize
    needed = {
        "parameters": count_parameters(model) * size, "gradients": trained * size,
        "optimizer": _optimizer_bytes(model, trained, train, precision.storage),
    }  # fmt: skip
    found = {name: count / shards for name, count in needed.items()}
    return {**found, "gathered": _gathered(model, train, precision, shards)}


def _optimizer_bytes(model: nn.Module, trained: int, train: TrainSection, storage: torch.dtype) -> float:
    section = train.optimizer
    if section.chosen == "muon":
        options = section.arguments()
        matrices = sum(matrix.numel() for matrix in hidden_matrices(model, exclude=options["exclude"]))
        moment = 2 if options["moments"] == "bf16" else storage.itemsize
        return matrices * storage.itemsize + 2 * (trained - matrices) * moment
    return trained * _state_per_parameter(section, storage)


def _state_per_parameter(section: OptimizerSection, storage: torch.dtype) -> float:
    """Return how many bytes a step leaves per parameter, found by taking one on a layer."""
    layer = nn.Linear(512, 512, bias=False, dtype=storage)
    optimizer = section.model_copy(update={"no_decay": [], "lr_scale": {}}).build(layer)
    layer.weight.grad = torch.ones_like(layer.weight)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    kept = [value for value in optimizer.state[layer.weight].values() if isinstance(value, Tensor) and value.ndim]
    return sum(part.nbytes for value in kept for part in _stored(value)) / layer.weight.numel()


def _stored(tensor: Any) -> list[Tensor]:
    """Return the tensors that one is made of: codes and scales of torchao's 8-bit moments, else itself."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
    return [getattr(tensor, name) for name in names] or [tensor]


def _gathered(model: nn.Module, train: TrainSection, precision: Precision, shards: int) -> float:
    plan = derive_plan(model)
    elsewhere = 1 - 1 / train.expert_parallel_size  # the share of the experts that other ranks hold
    experts = {name: elsewhere * count_parameters(model.get_submodule(name)) for name in plan.experts}
    everything = count_parameters(model) - sum(experts.values())
    if train.data_parallel_mode in ("single", "ddp"):
        return everything * precision.compute.itemsize if precision.mixed else 0
    if shards == 1 and not precision.mixed:
        return 0
    sizes = [
        count_parameters(model.get_submodule(block))
        - sum(size for name, size in experts.items() if name.startswith(f"{block}."))
        for block in plan.blocks
    ]
    options = train.strategy.arguments()
    ends = [count_parameters(model.get_submodule(name)) for name in (*plan.embeddings, *plan.heads)]
    ends = ends if train.data_parallel_mode == "fsdp2" else []  # others hold them in the outermost unit
    stays = not options.get("reshard_after_forward", True) or options.get("sharding") == "grad_op"
    if stays or shards == 1:  # what one rank holds is gathered once
        return everything * precision.compute.itemsize
    block = max(sizes, default=0)
    at_once = block + max(block * max(1, options.get("prefetch", 0)), *ends, 0)
    return min(everything, everything - sum(sizes) - sum(ends) + at_once) * precision.compute.itemsize


def count_parameters(module: nn.Module, *, trained: bool = False) -> int:
    """Return how many numbers the parameters of a module are."""
    return sum(each.numel() for each in module.parameters() if each.requires_grad or not trained)


class RowMemory:
    """The peak device memory of a step over rows of some length, activations included; in bytes per rank.

    Parameters are sharded over ``shards`` ranks; with several ``micro_batches``, gradients of earlier ones are held.

    Raises:
        ConfigError: The activations of the model are not counted.
    """

    def __init__(self, model: nn.Module, train: TrainSection, shards: int, micro_batches: int = 1) -> None:
        memory = rank_memory(model, train, shards)
        on_host = train.strategy.arguments().get("cpu_offload", False)
        self._train, self._accumulated = train, micro_batches > 1
        self._gradients = 0.0 if on_host else memory["gradients"]
        self._always = memory["gathered"] + (0.0 if on_host else memory["parameters"] + memory["optimizer"])
        self._activations = train.count_activations(model)

    def peak(self, tokens: int, policy: ActivationPolicy) -> float:
        """Return the bytes at the peak of a step whose forwards take ``tokens`` on a rank."""
        activations = self._activations.bytes(tokens, policy, self._gradients, accumulated=self._accumulated)
        return self._always + activations

    def chosen(self, row_length: int) -> ActivationPolicy:
        """Return the activation policy of the configuration; ConfigError where its budget is too small."""
        policy = ActivationPolicy()
        for each in self._train.build_strategies(row_length):
            if isinstance(each, ActivationBudget):
                policy = choose(self._activations, each.memory, each.tokens)
            elif isinstance(each, ActivationCheckpointing):
                policy = policy._replace(recompute=each.mode, offload=each.offload)
            elif isinstance(each, TiledMLP):
                policy = policy._replace(tile=each.tokens)
        return policy

    def longest(self, memory: float) -> Iterator[tuple[ActivationPolicy, int]]:
        """Yield each activation policy with the most tokens of a forward on a device of ``memory`` bytes."""
        left = memory - self._always
        for policy in self._activations.policies:
            yield policy, self._activations.longest(left, policy, self._gradients, accumulated=self._accumulated)
