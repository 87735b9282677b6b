"""Optimizers by name, with the fastest implementation that works for the parameters at hand."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, cast

from annotated_types import Ge, Gt, Lt
from pydantic import ConfigDict, Field
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Optimizer

from veomni.compat.optimizers import AdamW, on_shards
from veomni.config.section import ComponentSection, checked, section_of
from veomni.errors import ConfigError
from veomni.logging import create_logger
from veomni.optim.groups import NO_DECAY, Groups, build_optimizer_groups, scale_lr, split_by_lr_scale
from veomni.optim.multi import combine, members_by_mesh
from veomni.registry import Registry

logger = create_logger(__name__)

_FUSED_DEVICES = {"cpu", "cuda"}

Rate = Annotated[float, Ge(0.0)]
Beta = Annotated[float, Ge(0.0), Lt(1.0)]
Positive = Annotated[float, Gt(0.0)]

OPTIMIZERS: Registry[Any] = Registry("optimizer", group="veomni.optimizers", home="veomni.optim")
"""Name to an optimizer class, a function of groups of parameters and options, or an :class:`OptimizerRecipe`."""


class OptimizerRecipe(ABC):
    """An optimizer made of several: it is given the whole model, not the parameters of one mesh."""

    @abstractmethod
    def members(self, model: nn.Module, groups: Groups) -> Mapping[str, Optimizer]:
        """Return the optimizers by name; each parameter of the model's ``groups`` belongs to exactly one."""


class OptimizerSection(ComponentSection):
    """The optimizer and its groups."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    configures = ("build_optimizer",)

    weight_decay: float = Field(default=0.1, ge=0.0)
    """Decoupled weight decay (AdamW, Muon), or L2 penalty (SGD)."""
    no_decay: list[str] = Field(default=list(NO_DECAY))
    """Glob patterns of parameter names that weight_decay leaves alone."""
    lr_scale: dict[str, Positive] = Field(default_factory=dict)
    """Glob patterns of parameter or module names to factors of lr, such as {model.visual: 0.1}; of several that match a
    parameter the last counts."""

    def build(self, model: nn.Module) -> Optimizer:
        """Return the optimizer of a model that a strategy has taken over."""
        own = {key: value for key, value in self.arguments().items() if key not in OptimizerSection.model_fields}
        return self.apply(type(self).component, model, own)

    def apply(self, factory: Callable[..., Any], model: nn.Module, options: Mapping[str, Any]) -> Optimizer:
        """Return what an optimizer class, a function or a recipe makes of a model's groups and of its own options."""
        groups = build_optimizer_groups(model, weight_decay=self.weight_decay, no_decay=self.no_decay)
        groups = split_by_lr_scale(model, groups, self.lr_scale)
        if isinstance(factory, type) and issubclass(factory, OptimizerRecipe):
            return scale_lr(combine(factory(**options).members(model, groups)))
        create = cast("Callable[..., Optimizer]", partial(on_shards(factory), **options))
        try:
            return scale_lr(combine(members_by_mesh(groups, create)))
        except TypeError as error:
            raise ConfigError(f"the optimizer {factory.__name__}: {error}", "give the arguments it takes") from error


def build_optimizer(
    model: nn.Module, name: str | Callable[..., Any] = "adamw", *, weight_decay: float = 0.1,
    no_decay: Sequence[str] = NO_DECAY, lr_scale: Mapping[str, float] | None = None, **options: Any,
) -> Optimizer:  # fmt: skip
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
        ConfigError: there is no optimizer or option of that name, a value is wrong, or a pattern matches nothing.
        ModelError: no parameter is trained, or Muon has no matrices that it can use.
    """
    shared = {"weight_decay": weight_decay, "no_decay": no_decay, "lr_scale": lr_scale or {}}
    factory = OPTIMIZERS.get(name) if isinstance(name, str) else name
    if factory is name and not (isinstance(name, type) and issubclass(name, OptimizerRecipe)):
        return checked(OptimizerSection, shared).apply(name, model, options)
    section = section_of(factory, supplied=frozenset({"params"}), base=OptimizerSection)
    return checked(section, shared | options).build(model)


@OPTIMIZERS.register("adamw")
def adamw(
    params: Groups, *, lr: Rate = 3e-4, betas: tuple[Beta, Beta] = (0.9, 0.95), eps: Positive = 1e-8,
    fused: bool | None = None,
) -> Optimizer:  # fmt: skip
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
def sgd(params: Groups, *, lr: Rate = 3e-4, momentum: Beta = 0.9, fused: bool | None = None) -> Optimizer:
    """Stochastic gradient descent.

    Args:
        params: Groups of parameters on one mesh.
        lr: Peak learning rate.
        momentum: Decay rate of the sum of gradients.
        fused: Update all parameters in one kernel; null does where PyTorch can.
    """
    fused = _can_fuse(params, sharded=False) if fused is None else fused  # DTensor has no rule for PyTorch's fused SGD
    return SGD(params, lr=lr, momentum=momentum, fused=fused or None)


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
