"""The optimizer "adamw_bf16": AdamW with moments in bfloat16, rounded stochastically."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from veomni.compat.optimizers import compiled_for_each_shape, gradient_like, local_shards
from veomni.compat.tensors import shard_box
from veomni.config.problems import Problem
from veomni.config.section import ComponentSection
from veomni.errors import ModelError
from veomni.optim.groups import Groups, NamedParameters, is_fsdp1
from veomni.optim.multi import members_by_mesh
from veomni.optim.optimizer import OPTIMIZERS, Beta, OptimizerRecipe, Positive, Rate
from veomni.optim.stochastic_rounding import element_numbers, mix, round_to_bfloat16

_MOMENTS = ("exp_avg", "exp_avg_sq")


@OPTIMIZERS.register("adamw_bf16")
class AdamWBF16(OptimizerRecipe):
    """AdamW whose moments are stored in bfloat16 with stochastic rounding; it computes in float32.

    Rounding depends only on a parameter's name, the step and the element, so it is the same in every layout. On an
    accelerator the first step compiles a graph for each shape.

    Args:
        lr: Peak learning rate.
        betas: Decay rates of the first and second moment.
        eps: Addend to the denominator.
    """

    def __init__(self, *, lr: Rate = 3e-4, betas: tuple[Beta, Beta] = (0.9, 0.95), eps: Positive = 1e-8) -> None:
        self._options: dict[str, Any] = {"lr": lr, "betas": tuple(betas), "eps": eps}

    def members(self, model: nn.Module, groups: Groups) -> Mapping[str, Optimizer]:
        """Return the optimizer of each mesh; a ModelError under FSDP1 and for parameters that are not dense float32."""
        if is_fsdp1(model):
            problem = (
                "adamw_bf16 rounds by the index of an element in its parameter, which FSDP1's flat shards have lost"
            )
            raise ModelError(problem, "use FSDP2, or the optimizer adamw")
        sparse = [name for name, each in model.named_modules() if getattr(each, "sparse", False)]
        if sparse:
            problem = f"adamw_bf16 takes no sparse gradients, which {sparse[0]} makes"
            raise ModelError(problem, "build the embedding with sparse=False")
        other = {str(each.dtype) for group in groups for each in group["params"]} - {"torch.float32"}
        if other:
            problem = f"adamw_bf16 steps in float32, and the model has parameters of {', '.join(sorted(other))}"
            raise ModelError(problem, "use the optimizer adamw")
        keys = {parameter: crc32(names[0].encode()) for parameter, names in NamedParameters(model).items()}
        return members_by_mesh(groups, partial(_AdamW, keys=keys, **self._options))

    @staticmethod
    def config_problems(options: ComponentSection, config: Any, world: int | None) -> Iterator[Problem]:
        """Yield the options that it does not support: FSDP1, whose shards are flat, and fp64."""
        train, name = config.train, "train.optimizer.name adamw_bf16"
        if train.data_parallel_mode == "fsdp1":
            problem = f"{name} rounds by the index of an element, which flat shards have lost "
            problem += "(train.data_parallel_mode fsdp1)"
            yield Problem(problem, "use fsdp2, ddp or single, or train.optimizer.name adamw")
        if train.precision == "fp64":
            yield Problem(f"{name} steps in float32, and train.precision is fp64", "use train.optimizer.name adamw")


class _AdamW(Optimizer):
    """Steps float32 parameters of one mesh; ``keys`` seed the rounding of each, and are the same in every layout."""

    def __init__(self, params: Groups, *, keys: Mapping[Any, int], **options: Any) -> None:
        super().__init__(params, {"weight_decay": 0.0, **options})
        self._keys = keys
        self.register_load_state_dict_post_hook(_moments_in_bfloat16)

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            alike: dict[Any, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    step = self._count(parameter)
                    alike[step, parameter.shape, getattr(parameter, "placements", ())].append(parameter)
            for (step, *_), parameters in alike.items():
                self._update(parameters, group, step)
        return loss

    def _count(self, parameter: Tensor) -> int:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state |= {name: torch.zeros_like(parameter, dtype=torch.bfloat16) for name in _MOMENTS}
        state["step"] += 1
        return int(state["step"])

    def _update(self, parameters: Sequence[Tensor], group: Mapping[str, Any], step: int) -> None:
        """Take step number ``step`` of parameters of one shape and placement."""
        (beta1, beta2), rate = group["betas"], float(group["lr"])
        correction = 1 - beta1**step, (1 - beta2**step) ** 0.5
        numbers = [1 - rate * group["weight_decay"], rate / correction[0], 1 / correction[1]]
        # As tensors, since a graph is compiled for each value of a float; one for each parameter, since Inductor fuses
        # updates that read the same tensor into one kernel.
        owned = torch.tensor([numbers] * len(parameters)).unbind()
        keys = torch.tensor([mix(self._keys[parameter] ^ mix(step)) for parameter in parameters]).unbind()
        shards = [
            (
                *local_shards([each, *(self.state[each][name] for name in _MOMENTS)]),
                gradient_like(each),
                key,
                *own.unbind(),
            )
            for each, key, own in zip(parameters, keys, owned, strict=True)
        ]
        first = parameters[0]
        box = shard_box(first) if isinstance(first, DTensor) else tuple(slice(0, size) for size in first.shape)
        update = _update if first.device.type == "cpu" else compiled_for_each_shape(_update)
        update(shards, betas=group["betas"], eps=group["eps"], box=box, shape=first.shape)


def _update(
    shards: Sequence[tuple[Tensor, ...]], *, betas: tuple[float, float], eps: float, box: Sequence[slice],
    shape: Sequence[int],
) -> None:  # fmt: skip
    """Step the shards ``box`` of parameters of one ``shape``, each with its moments, gradient, key and numbers."""
    places = element_numbers(box, shape, shards[0][0].device)
    for parameter, mean, square, gradient, key, decay, rate, scale in shards:
        bits = mix(places ^ key)
        new_mean = mean.float().lerp(gradient, 1 - betas[0])
        new_square = square.float().lerp(gradient.square(), 1 - betas[1])
        mean.copy_(round_to_bfloat16(new_mean, (bits & 0xFFFF).int()))
        square.copy_(round_to_bfloat16(new_square, (bits >> 16).int()))
        parameter.mul_(decay).sub_(rate * new_mean / (new_square.sqrt() * scale + eps))


def _moments_in_bfloat16(optimizer: Optimizer) -> None:
    """Cast loaded moments back to bfloat16: PyTorch casts them to the dtype of the parameter, float32, without loss."""
    for state in optimizer.state.values():
        state |= {name: state[name].to(torch.bfloat16) for name in _MOMENTS}
