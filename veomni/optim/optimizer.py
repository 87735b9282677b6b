"""Optimizers by name, with the fastest implementation that works for the parameters at hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer

from veomni.errors import ConfigError
from veomni.logging import create_logger
from veomni.optim.groups import build_optimizer_groups
from veomni.registry import did_you_mean

logger = create_logger(__name__)

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
    fused: bool | None = None,
) -> Optimizer:
    """Return the optimizer of a model that a strategy has taken over; the arguments are ``train.optimizer``'s.

    Args:
        model: What ``Launcher.setup_model`` returned.
        name: "adamw" or "sgd".
        lr: Peak learning rate.
        betas: AdamW's two decay rates.
        eps: AdamW's addend to the denominator.
        weight_decay: Decoupled (AdamW) or an L2 penalty (SGD); see :func:`build_optimizer_groups`.
        momentum: SGD's.
        no_decay: Patterns of parameters without weight decay.
        fused: Update all parameters in one kernel; None does where PyTorch can: all on CPU or all on CUDA, and all
            unsharded or (AdamW only) all on one device mesh.

    Raises:
        ConfigError: there is no optimizer of that name, or a pattern matches nothing.
        ModelError: no parameter is trained.
    """
    if name not in ("adamw", "sgd"):
        raise ConfigError(
            f"train.optimizer.name: no optimizer is called {name!r}", did_you_mean(name, ["adamw", "sgd"])
        )
    groups = build_optimizer_groups(model, weight_decay=weight_decay, no_decay=no_decay)
    if fused is None:
        parameters = [parameter for group in groups for parameter in group["params"]]
        fused = _can_fuse(parameters, sharded=name != "sgd")  # DTensor has no rule for PyTorch's fused SGD
    if name == "sgd":
        return SGD(groups, lr=lr, momentum=momentum, fused=fused or None)
    return AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused or None)


def _can_fuse(parameters: Iterable[Tensor], *, sharded: bool) -> bool:
    kinds = {
        (parameter.device.type, parameter.device_mesh if isinstance(parameter, DTensor) else None)
        for parameter in parameters
    }
    fits = len(kinds) == 1 and all(device in _FUSED_DEVICES and (sharded or mesh is None) for device, mesh in kinds)
    if not fits:
        seen = ", ".join(sorted({f"{device} ({'unsharded' if mesh is None else mesh})" for device, mesh in kinds}))
        logger.info_rank0("the optimizer is not fused: its parameters are on %s", seen)
    return fits
