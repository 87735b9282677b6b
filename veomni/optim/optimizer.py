"""Optimizers by name, with the fastest implementation that works for the parameters at hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer

from veomni.errors import ConfigError, ModelError
from veomni.logging import create_logger
from veomni.optim.groups import build_optimizer_groups
from veomni.optim.lr_scale import scale_lr, split_by_lr_scale
from veomni.optim.matrices import hidden_matrices
from veomni.optim.multi import combine, members_by_mesh
from veomni.optim.muon import Muon
from veomni.optim.names import is_fsdp1
from veomni.registry import did_you_mean

logger = create_logger(__name__)

NAMES = ("adamw", "sgd", "muon")
_FUSED_DEVICES = {"cpu", "cuda"}


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    momentum: float,
    no_decay: Sequence[str],
    lr_scale: Mapping[str, float] | None = None,
    muon: Mapping[str, Any] | None = None,
    fused: bool | None = None,
) -> Optimizer:
    """Return the optimizer of a model that a strategy has taken over; the arguments are ``train.optimizer``'s.

    Parameters that live on several device meshes get an optimizer for each mesh, behind one
    :class:`~veomni.optim.MultiOptimizer`; so do the two kinds of parameters that "muon" tells apart.

    Args:
        model: What ``Launcher.setup_model`` returned.
        name: "adamw", "sgd", or "muon": Muon for the matrices of the blocks, AdamW for the rest.
        lr: Peak learning rate.
        betas: AdamW's two decay rates.
        eps: AdamW's addend to the denominator.
        weight_decay: Decoupled (AdamW, Muon) or an L2 penalty (SGD); see :func:`build_optimizer_groups`.
        momentum: SGD's.
        no_decay: Patterns of parameters without weight decay.
        lr_scale: Patterns of parameters to factors of ``lr``; see :func:`~veomni.optim.split_by_lr_scale`.
        muon: What is Muon's own: ``lr``, where it differs, ``momentum``, ``nesterov``, ``ns_steps``, and ``exclude``,
            patterns of matrices that AdamW gets; None takes the defaults.
        fused: Update all parameters in one kernel; None does where PyTorch can: all of an optimizer's on CPU or all on
            CUDA, and (SGD) unsharded.

    Raises:
        ConfigError: there is no optimizer of that name, or a pattern matches nothing.
        ModelError: no parameter is trained, or Muon has no matrices that it can use.
    """
    if name not in NAMES:
        raise ConfigError(f"train.optimizer.name: no optimizer is called {name!r}", did_you_mean(name, list(NAMES)))
    groups = build_optimizer_groups(model, weight_decay=weight_decay, no_decay=no_decay)
    groups = split_by_lr_scale(model, groups, lr_scale or {})
    if name == "sgd":
        return scale_lr(combine(members_by_mesh(groups, partial(_sgd, lr=lr, momentum=momentum, fused=fused))))
    adamw = partial(_adamw, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)
    if name == "adamw":
        return scale_lr(combine(members_by_mesh(groups, adamw)))
    own = dict(muon or {})
    matrices = _muon_matrices(model, own.pop("exclude", ()))
    own["lr"] = lr if own.get("lr") is None else own["lr"]
    parts = {
        "muon": members_by_mesh(_only(groups, matrices, inside=True), partial(Muon, **own)),
        "adamw": members_by_mesh(_only(groups, matrices, inside=False), adamw),
    }
    members = {f"{kind}.{mesh}": member for kind, found in parts.items() for mesh, member in found.items()}
    return scale_lr(combine(members))


def _adamw(
    groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, fused: bool | None
) -> Optimizer:
    fused = _can_fuse(groups, sharded=True) if fused is None else fused
    return AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused or None)


def _sgd(groups: list[dict[str, Any]], *, lr: float, momentum: float, fused: bool | None) -> Optimizer:
    fused = _can_fuse(groups, sharded=False) if fused is None else fused  # DTensor has no rule for PyTorch's fused SGD
    return SGD(groups, lr=lr, momentum=momentum, fused=fused or None)


def _muon_matrices(model: nn.Module, exclude: Sequence[str]) -> set[Tensor]:
    if is_fsdp1(model):
        raise ModelError(
            "muon needs the rows and columns of matrices, and FSDP1 keeps flat pieces of them",
            "set train.data_parallel_mode to fsdp2, or train.optimizer.name to adamw",
        )
    matrices = hidden_matrices(model, exclude=exclude)
    if not matrices:
        raise ModelError("muon found no matrix to train inside the model's blocks", "set train.optimizer.name to adamw")
    return set(matrices)


def _only(groups: Iterable[dict[str, Any]], parameters: set[Tensor], *, inside: bool) -> list[dict[str, Any]]:
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
