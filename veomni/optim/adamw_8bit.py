"""The optimizer "adamw_8bit": AdamW with a quarter of the memory for its state, by torchao."""

import importlib.util
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from veomni.config.problems import Problem
from veomni.config.section import ComponentSection
from veomni.errors import MissingExtraError, ModelError
from veomni.optim.groups import Groups, is_fsdp1
from veomni.optim.multi import members_by_mesh
from veomni.optim.optimizer import OPTIMIZERS, Beta, OptimizerRecipe, Positive, Rate


@OPTIMIZERS.register("adamw_8bit")
class AdamW8bit(OptimizerRecipe):
    """AdamW whose moments have 8 bits, in blocks of 256 values with a scale (arXiv:2110.02861); needs torchao.

    Where a rank holds fewer than 4096 values of a parameter, or no whole number of blocks, they keep its format. On an
    accelerator the first step compiles a kernel for each shape.

    Args:
        lr: Peak learning rate.
        betas: Decay rates of the first and second moment.
        eps: Addend to the denominator.
    """

    def __init__(self, *, lr: Rate = 3e-4, betas: tuple[Beta, Beta] = (0.9, 0.95), eps: Positive = 1e-8) -> None:
        if importlib.util.find_spec("torchao") is None:
            raise MissingExtraError("torchao", "torchao")
        self._options: dict[str, Any] = {"lr": lr, "betas": tuple(betas), "eps": eps}

    def members(self, model: nn.Module, groups: Groups) -> Mapping[str, Optimizer]:
        """Return torchao's optimizer for each mesh; a ModelError under FSDP1."""
        if is_fsdp1(model):
            problem = "adamw_8bit has blocks of values, and FSDP1 cuts parameters anywhere"
            raise ModelError(problem, "use FSDP2, or the optimizer adamw")
        from torchao.optim import AdamW8bit as AdamWOfTorchao

        return members_by_mesh(groups, partial(AdamWOfTorchao, **self._options))

    @staticmethod
    def config_problems(options: ComponentSection, config: Any, world: int | None) -> Iterator[Problem]:
        """Yield what it cannot do: step flat pieces of parameters, and float64."""
        train, name = config.train, "train.optimizer.name adamw_8bit"
        if train.data_parallel_mode == "fsdp1":
            problem = f"{name} has blocks of values, and train.data_parallel_mode fsdp1 cuts parameters anywhere"
            yield Problem(problem, "use fsdp2, ddp or single, or train.optimizer.name adamw")
        if train.precision == "fp64":
            yield Problem(f"{name} steps in float32, and train.precision is fp64", "use train.optimizer.name adamw")
