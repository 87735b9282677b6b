"""Optimizers by name, with the fastest implementation that works for the parameters at hand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, cast

from annotated_types import Ge, Gt, Lt
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer

from veomni.config.problems import Problem
from veomni.config.section import ComponentSection
from veomni.errors import ModelError
from veomni.logging import create_logger
from veomni.optim.groups import build_optimizer_groups
from veomni.optim.lr_scale import scale_lr, split_by_lr_scale
from veomni.optim.matrices import hidden_matrices
from veomni.optim.multi import combine, members_by_mesh
from veomni.optim.muon import Muon
from veomni.optim.names import is_fsdp1
from veomni.registry import Registry

logger = create_logger(__name__)

_FUSED_DEVICES = {"cpu", "cuda"}
_NO_DECAY = ("*norm*", "*.bias")

Beta = Annotated[float, Ge(0.0), Lt(1.0)]
Groups = list[dict[str, Any]]

OPTIMIZERS: Registry[Any] = Registry("optimizer", group="veomni.optimizers", home="veomni.optim")
"""Name to an optimizer class, a function of groups of parameters and options, or an :class:`OptimizerRecipe`."""


class OptimizerRecipe(ABC):
    """An optimizer made of several: it is given the whole model, not the parameters of one mesh."""

    @abstractmethod
    def members(self, model: nn.Module, groups: Groups) -> Mapping[str, Optimizer]:
        """Return the optimizers by name; each parameter of ``groups`` belongs to exactly one.

        Args:
            model: What ``Launcher.setup_model`` returned.
            groups: Its trained parameters, with the weight decay of each group.
        """


class OptimizerSection(ComponentSection):
    """The optimizer and its groups."""

    weight_decay: float = Field(
        default=0.1, ge=0.0, description="Decoupled weight decay (AdamW, Muon), or L2 penalty (SGD)."
    )
    no_decay: list[str] = Field(
        default=list(_NO_DECAY), description="Glob patterns of parameter names that weight_decay leaves alone."
    )
    lr_scale: dict[str, Annotated[float, Gt(0.0)]] = Field(
        default_factory=dict,
        description="Glob patterns of parameter or module names to factors of lr, such as {model.visual: 0.1}; of "
        "several that match a parameter the last counts.",
    )

    def build(self, model: nn.Module) -> Optimizer:
        """Return the optimizer of a model that a strategy has taken over."""
        options = {key: getattr(self, key) for key in type(self).model_fields}
        return build_optimizer(model, options.pop("name"), **options)


def build_optimizer(
    model: nn.Module,
    name: str | Callable[..., Any] = "adamw",
    *,
    weight_decay: float = 0.1,
    no_decay: Sequence[str] = _NO_DECAY,
    lr_scale: Mapping[str, float] | None = None,
    **options: Any,
) -> Optimizer:
    """Return the optimizer of a model that a strategy has taken over.

    Parameters that live on several device meshes get an optimizer for each mesh, behind one
    :class:`~veomni.optim.MultiOptimizer`; so do the two kinds of parameters that "muon" distinguishes.

    Args:
        model: What ``Launcher.setup_model`` returned.
        name: A registered optimizer ("adamw", "sgd", "muon"), or an optimizer class.
        weight_decay: Decoupled (AdamW, Muon) or an L2 penalty (SGD); see :func:`build_optimizer_groups`.
        no_decay: Patterns of parameters without weight decay.
        lr_scale: Patterns of parameters to factors of ``lr``; see :func:`~veomni.optim.split_by_lr_scale`.
        options: The optimizer's own, such as ``lr``.

    Raises:
        ConfigError: there is no optimizer of that name, or a pattern matches nothing.
        ModelError: no parameter is trained, or Muon has no matrices that it can use.
    """
    found = OPTIMIZERS.get(name) if isinstance(name, str) else name
    groups = build_optimizer_groups(model, weight_decay=weight_decay, no_decay=no_decay)
    groups = split_by_lr_scale(model, groups, lr_scale or {})
    if isinstance(found, type) and issubclass(found, OptimizerRecipe):
        return scale_lr(combine(found(**options).members(model, groups)))
    return scale_lr(combine(members_by_mesh(groups, cast("Callable[..., Optimizer]", partial(found, **options)))))


@OPTIMIZERS.register("adamw")
def adamw(
    params: Groups,
    *,
    lr: Annotated[float, Ge(0.0)] = 3e-4,
    betas: tuple[Beta, Beta] = (0.9, 0.95),
    eps: Annotated[float, Gt(0.0)] = 1e-8,
    fused: bool | None = None,
) -> Optimizer:
    """Adam with decoupled weight decay.

    Args:
        params: Groups of parameters on one mesh.
        lr: Peak learning rate.
        betas: Decay rates of the first and second moment.
        eps: Addend to the denominator.
        fused: Update all parameters in one kernel; null does where PyTorch can.
    """
    fused = _can_fuse(params, sharded=True) if fused is None else fused
    return AdamW(params, lr=lr, betas=betas, eps=eps, fused=fused or None)


@OPTIMIZERS.register("sgd")
def sgd(
    params: Groups,
    *,
    lr: Annotated[float, Ge(0.0)] = 3e-4,
    momentum: Annotated[float, Ge(0.0), Lt(1.0)] = 0.9,
    fused: bool | None = None,
) -> Optimizer:
    """Stochastic gradient descent.

    Args:
        params: Groups of parameters on one mesh.
        lr: Peak learning rate.
        momentum: Decay rate of the sum of gradients.
        fused: Update all parameters in one kernel; null does where PyTorch can.
    """
    fused = _can_fuse(params, sharded=False) if fused is None else fused  # DTensor has no rule for PyTorch's fused SGD
    return SGD(params, lr=lr, momentum=momentum, fused=fused or None)


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
        fused: Update AdamW's parameters in one kernel; null does where PyTorch can.
    """

    def __init__(
        self,
        *,
        lr: Annotated[float, Ge(0.0)] = 3e-4,
        betas: tuple[Beta, Beta] = (0.9, 0.95),
        eps: Annotated[float, Gt(0.0)] = 1e-8,
        matrix_lr: Annotated[float, Ge(0.0)] | None = None,
        momentum: Annotated[float, Ge(0.0), Lt(1.0)] = 0.95,
        nesterov: bool = True,
        ns_steps: Annotated[int, Field(ge=1, le=99)] = 5,
        exclude: Sequence[str] = (),
        fused: bool | None = None,
    ) -> None:
        self._adamw = partial(adamw, lr=lr, betas=betas, eps=eps, fused=fused)
        matrix_lr = lr if matrix_lr is None else matrix_lr
        self._muon = partial(Muon, lr=matrix_lr, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps)
        self._exclude = exclude

    def members(self, model: nn.Module, groups: Groups) -> Mapping[str, Optimizer]:
        """Return Muon and AdamW for each mesh, called "muon.fsdp", "adamw.fsdp" and the like."""
        matrices = _muon_matrices(model, self._exclude)
        parts = {
            "muon": members_by_mesh(_only(groups, matrices, inside=True), self._muon),
            "adamw": members_by_mesh(_only(groups, matrices, inside=False), self._adamw),
        }
        return {f"{kind}.{mesh}": member for kind, found in parts.items() for mesh, member in found.items()}

    @staticmethod
    def config_problems(options: ComponentSection, config: Any, world: int | None) -> Iterator[Problem]:
        """Yield what Muon cannot do: step flat pieces of matrices."""
        if config.train.data_parallel_mode == "fsdp1":
            yield Problem(
                "train.optimizer.name muon needs the rows and columns of matrices, and train.data_parallel_mode fsdp1 "
                "keeps flat pieces of them",
                "use fsdp2, ddp or single, or train.optimizer.name adamw",
            )


def _muon_matrices(model: nn.Module, exclude: Sequence[str]) -> set[Tensor]:
    if is_fsdp1(model):
        raise ModelError(
            "muon needs the rows and columns of matrices, and FSDP1 keeps flat pieces of them",
            "use FSDP2, or the optimizer adamw",
        )
    matrices = hidden_matrices(model, exclude=exclude)
    if not matrices:
        raise ModelError("muon found no matrix to train inside the model's blocks", "use the optimizer adamw")
    return set(matrices)


def _only(groups: Groups, parameters: set[Tensor], *, inside: bool) -> Groups:
    parts = [{**group, "params": [p for p in group["params"] if (p in parameters) is inside]} for group in groups]
    return [part for part in parts if part["params"]]


def _can_fuse(groups: Iterable[dict[str, Any]], *, sharded: bool) -> bool:
    kinds = {
        (parameter.device.type, parameter.device_mesh if isinstance(parameter, DTensor) else None)
        for group in groups
        for parameter in group["params"]
    }
    fits = len(kinds) == 1 and all(device in _FUSED_DEVICES and (sharded or mesh is None) for device, mesh in kinds)
    if not fits:
        seen = ", ".join(sorted({f"{device} ({'unsharded' if mesh is None else mesh})" for device, mesh in kinds}))
        logger.info_rank0("the optimizer is not fused: its parameters are on %s", seen)
    return fits
