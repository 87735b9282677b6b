"""The optimizer "muon": Muon for the matrices of hidden layers, AdamW for the other parameters."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.optim import Optimizer

from veomni.config.problems import Problem
from veomni.config.section import ComponentSection
from veomni.errors import ConfigError, ModelError
from veomni.optim.adamw_bf16 import AdamWBF16
from veomni.optim.groups import Groups, NamedParameters, is_fsdp1
from veomni.optim.multi import members_by_mesh
from veomni.optim.muon import Muon
from veomni.optim.optimizer import OPTIMIZERS, Beta, OptimizerRecipe, Positive, Rate, adamw
from veomni.parallel.wrappers import plain_name

_NO_MATRICES = (
    nn.Embedding, nn.EmbeddingBag, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


@OPTIMIZERS.register("muon")
class MuonWithAdamW(OptimizerRecipe):
    """Muon for the matrices of the blocks, AdamW for all other parameters.

    Args:
        lr: Peak learning rate.
        betas: AdamW's decay rates of the first and second moment.
        eps: AdamW's addend to the denominator.
        matrix_lr: Peak learning rate of the matrices; null is lr, as Muon's steps have the size of AdamW's.
        momentum: Muon's decay rate of the mean of gradients.
        nesterov: Look ahead by one gradient.
        ns_steps: Newton-Schulz steps that orthogonalise a matrix.
        exclude: Glob patterns of parameter or module names inside the blocks that AdamW gets.
        moments: Format of AdamW's moments: "bf16" takes the steps of adamw_bf16.
        fused: Update AdamW's parameters in one kernel; null does where PyTorch can.
    """

    def __init__(
        self, *, lr: Rate = 3e-4, betas: tuple[Beta, Beta] = (0.9, 0.95), eps: Positive = 1e-8,
        matrix_lr: Rate | None = None, momentum: Beta = 0.95, nesterov: bool = True,
        ns_steps: Annotated[int, Ge(1), Le(99)] = 5, exclude: Sequence[str] = (),
        moments: Literal["fp32", "bf16"] = "fp32", fused: bool | None = None,
    ) -> None:  # fmt: skip
        if moments == "bf16" and fused is not None:
            raise ConfigError('muon: fused has no meaning with moments "bf16"', "leave fused out", "muon.fused")
        self._adamw = partial(adamw, lr=lr, betas=betas, eps=eps, fused=fused)
        self._adamw_bf16 = AdamWBF16(lr=lr, betas=betas, eps=eps) if moments == "bf16" else None
        matrix_lr = lr if matrix_lr is None else matrix_lr
        self._muon = partial(Muon, lr=matrix_lr, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps)
        self._exclude = exclude

    def members(self, model: nn.Module, groups: Groups) -> Mapping[str, Optimizer]:
        """Return Muon and AdamW for each mesh, called "muon.fsdp", "adamw.fsdp" and the like."""
        if is_fsdp1(model):
            problem = "muon needs the rows and columns of matrices, and FSDP1 keeps flat pieces of them"
            raise ModelError(problem, "use FSDP2, or the optimizer adamw")
        matrices: set[Tensor] = set(hidden_matrices(model, exclude=self._exclude))
        if not matrices:
            raise ModelError("muon found no matrix to train inside the model's blocks", "use the optimizer adamw")
        muon = members_by_mesh(_only(groups, matrices, inside=True), self._muon)
        others, bf16 = _only(groups, matrices, inside=False), self._adamw_bf16
        adamw = members_by_mesh(others, self._adamw) if bf16 is None else bf16.members(model, others)
        named = {f"muon.{mesh}": member for mesh, member in muon.items()}
        return named | {f"adamw.{mesh}": member for mesh, member in adamw.items()}

    @staticmethod
    def config_problems(options: ComponentSection, config: Any, world: int | None) -> Iterator[Problem]:
        """Yield the options that it does not support: FSDP1, whose shards are flat, and bfloat16 moments in fp64."""
        if config.train.precision == "fp64" and options.arguments()["moments"] == "bf16":
            problem = "train.optimizer.moments bf16 steps in float32, and train.precision is fp64"
            yield Problem(problem, "leave moments out")
        if config.train.data_parallel_mode == "fsdp1":
            yield Problem(
                "train.optimizer.name muon needs the rows and columns of matrices, and train.data_parallel_mode fsdp1 "
                "keeps flat pieces of them",
                "use fsdp2, ddp or single, or train.optimizer.name adamw",
            )


def _only(groups: Groups, parameters: set[Tensor], *, inside: bool) -> Groups:
    parts = [{**group, "params": [p for p in group["params"] if (p in parameters) is inside]} for group in groups]
    return [part for part in parts if part["params"]]


def hidden_matrices(model: nn.Module, *, exclude: Sequence[str] = ()) -> list[nn.Parameter]:
    """Return the trained matrices inside the model's blocks, in its order.

    A block is an element of an ``nn.ModuleList``, so embeddings, heads and projectors outside the repeated layers are
    left out. Inside, a matrix is a two-dimensional parameter called ``weight``, or each slice of a three-dimensional
    one: experts are stacks ``[experts, rows, columns]``. Embeddings, convolutions, biases and what has a side of 1 are
    none, nor what the shell patterns of ``exclude`` match by the name of a parameter or module: ``*.router``; one that
    matches nothing is a ConfigError. FSDP1 must not wrap the model: its parameters have lost their shapes.
    """
    parameters = NamedParameters(model)
    candidates = _inside_blocks(model) - parameters.matching(exclude, "exclude")
    return [
        parameter
        for parameter, (name, *_) in parameters.items()
        if parameter in candidates and parameter.requires_grad and _is_matrix(parameter, name)
    ]


def _is_matrix(parameter: nn.Parameter, name: str) -> bool:
    named = name.endswith("weight") if parameter.ndim == 2 else not name.endswith("bias")
    return parameter.ndim in (2, 3) and min(parameter.shape[-2:]) > 1 and named


def _inside_blocks(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters under the elements of module lists whose modules can hold matrices."""
    lists = [plain_name(f"{name}.") for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    inside: set[nn.Parameter] = set()
    outside: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        block = plain_name(f"{name}.").startswith(tuple(lists)) and not isinstance(module, _NO_MATRICES)
        (inside if block else outside).update(module.parameters(recurse=False))
    return inside - outside
