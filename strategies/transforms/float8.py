"""Linear layers of blocks computed in float8, by torchao."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from veomni.config.section import Validated
from veomni.errors import ConfigError, DeviceError, MissingExtraError, ModelError
from veomni.logging import create_logger
from veomni.registry import did_you_mean
from veomni.strategies.base import SetupContext, Stage, Strategy

if TYPE_CHECKING:
    from veomni.models.adapter.adapter import ModelAdapter
    from veomni.parallel.plan import ParallelPlan

logger = create_logger(__name__)

_MULTIPLE = 16  # of both sizes of a weight, for the device's product

Recipe = Literal["tensorwise", "rowwise"]


@dataclass(eq=False)
class Float8(Validated, Strategy):
    """Compute the matrix products of linear layers, in forward and backward, from float8 operands; needs torchao.

    It applies to linear layers inside the model's blocks, except routers, experts and modules kept in float32. Weights,
    gradients and checkpoints keep their names and dtypes; operands are scaled and cast for each product. Use it with
    Compile, which fuses the casts.

    Args:
        recipe: One scale for a tensor ("tensorwise", fastest), or for each row and column ("rowwise", more accurate).
        exclude: Glob patterns of names of linear layers that keep the precision of the run.
        emulate: Multiply the cast operands in float32: the same rounding error, slowly, on any device.
    """

    name = "float8"
    stage = Stage.FLOAT8

    recipe: Recipe = "tensorwise"
    exclude: Sequence[str] = field(default=())
    emulate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if find_spec("torchao") is None:
            raise MissingExtraError("torchao", "torchao")

    @override
    def transform(self, adapter: ModelAdapter, context: SetupContext) -> None:
        if context.precision.name == "fp64":
            problem = "Float8 was given for a run in fp64, which computes in float64 throughout"
            raise ConfigError(problem, "leave Float8 out, or use precision bf16", "Launcher.precision")
        if not (self.emulate or context.accelerator.supports_float8):
            problem = f"Float8: accelerator {context.accelerator.name} has no float8 products here"
            fix = "leave Float8 out, use a GPU of compute capability 9.0 or newer, or emulate it to see its error"
            raise DeviceError(problem, fix, "Float8.recipe Float8.emulate")
        chosen = self._choose(adapter.model, context.plan)
        make_forward = _float8_forward(self.recipe, self.emulate)
        for linear in chosen:
            adapter.patch(linear, "forward", make_forward(linear))

    def _choose(self, model: nn.Module, plan: ParallelPlan) -> list[nn.Linear]:
        """Return the layers to compute in float8, and log how many are left out; a ModelError where none remains."""
        linears = {name: each for name, each in model.named_modules() if type(each) is nn.Linear}
        for pattern in self.exclude:
            if not any(fnmatchcase(name, pattern) for name in linears):
                problem = f"Float8.exclude: no linear layer matches {pattern!r}"
                raise ConfigError(problem, did_you_mean(pattern, list(linears)), "Float8.exclude")
        reasons = {name: self._why_not(name, linear, plan) for name, linear in linears.items()}
        chosen = [linears[name] for name, reason in reasons.items() if not reason]
        left = Counter(reason for reason in reasons.values() if reason)
        left_out = ", ".join(f"{count} {reason}" for reason, count in left.items()) or "none"
        if not chosen:
            problem = f"Float8 has no linear layer to compute: {left_out} of {type(model).__name__}"
            raise ModelError(problem, "leave Float8 out")
        logger.info_rank0("float8 (%s): %s linear layers; left out: %s", self.recipe, len(chosen), left_out)
        return chosen

    def _why_not(self, name: str, linear: nn.Linear, plan: ParallelPlan) -> str:
        if any(fnmatchcase(name, pattern) for pattern in self.exclude):
            return "excluded"
        if not any(name.startswith(f"{block}.") for block in plan.blocks):
            return "outside of blocks"
        if any(f"{name}.".startswith(f"{kept}.") for kept in plan.keep_fp32):
            return "kept in float32"
        if name.rpartition(".")[0] in {experts.rpartition(".")[0] for experts in plan.experts}:
            return "beside experts (routers)"
        odd = linear.in_features % _MULTIPLE or linear.out_features % _MULTIPLE
        return f"with a size that is no multiple of {_MULTIPLE}" if odd else ""


def _float8_forward(recipe: Recipe, emulate: bool) -> Callable[[nn.Linear], Callable[[Tensor], Tensor]]:
    """Return a function from a linear layer to its forward in float8, which maps ``[..., in]`` to ``[..., out]``."""
    import dataclasses

    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

    # The number of tokens is padded, where it is no multiple of 16 either.
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate, pad_inner_dim=True)
    # Layers stay nn.Linear, since strategies hold them; one that torchao converts supplies its product configuration.
    example: Any = convert_to_float8_training(nn.Linear(_MULTIPLE, _MULTIPLE, device="meta"), config=config)
    products = example.linear_mm_config

    def make_forward(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(rows: Tensor) -> Tensor:
            kind = rows.device.type
            if torch.is_autocast_enabled(kind):
                rows = rows.to(torch.get_autocast_dtype(kind))
            if not rows.numel():  # nothing has a largest value, nor a scale
                return F.linear(rows, linear.weight, linear.bias)
            output: Tensor = matmul_with_hp_or_float8_args.apply(rows, linear.weight.t(), products, config)
            return output if linear.bias is None else output + linear.bias.to(output.dtype)

        return forward

    return make_forward
