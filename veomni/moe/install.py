"""Give a model a controller of its routers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from veomni.errors import ModelError
from veomni.logging import create_logger
from veomni.models.adapter.adapter import ModelAdapter
from veomni.models.adapter.passes.token_loss import DropBalanceLoss
from veomni.models.transformers_api.experts import own_balance_loss
from veomni.moe.bias import check_bias
from veomni.moe.controller import RouterController
from veomni.moe.options import MoEOptions
from veomni.moe.router_hooks import hook_routers
from veomni.moe.routers import Router, Routers, RouterScoring, find_routers
from veomni.parallel.mesh import ParallelState

logger = create_logger(__name__)


def install_controller(
    model: nn.Module, options: MoEOptions, state: ParallelState, device: torch.device, dtype: torch.dtype
) -> RouterController:
    """Hook the routers of a model and put their controller into its adapter; a model without any is left alone.

    Args:
        model: The model, before it is recomputed, compiled and sharded.
        options: How routers are balanced and reported.
        state: The mesh.
        device: Where the model will run.
        dtype: What losses are summed in.

    Raises:
        ModelError: an option cannot be applied to this model.
    """
    adapter = ModelAdapter.of(model)
    examined = adapter.traits and adapter.traits.get(RouterScoring)
    found: Routers = examined.found if examined else find_routers(model)
    _check_found(model, found, options)
    own, aux = own_balance_loss(model), options.aux_loss_coef
    if own is not None and found.readable and not found.unreadable:
        aux = own if aux is None else aux
        adapter.add(DropBalanceLoss())
        logger.info_rank0("the model's own load-balancing loss, taken on each rank's tokens alone, is off; the one "
                          "taken on the global batch has weight %s", aux)  # fmt: skip
    elif own:
        logger.warning_rank0("the model adds its own load-balancing loss, taken on each rank's tokens alone: "
                             "the decisions of its routers cannot be read")  # fmt: skip
    for router in found.readable:
        _check_losses(router, aux or 0.0, options.z_loss_coef)
    for undo in hook_routers(found):
        adapter.on_remove(undo)
    adapter.routers = RouterController(found, replace(options, aux_loss_coef=aux or 0.0), state, device, dtype)
    return adapter.routers


def _check_found(model: nn.Module, found: Routers, options: MoEOptions) -> None:
    option = options.needs_routers
    if option is None:
        return
    fix = f"set {option} of the router options to 0"
    if found.unreadable:
        raise ModelError(f"what {found.unreadable[0]} of {type(model).__name__} decides cannot be read", fix)
    if not found.readable:
        raise ModelError(f"{type(model).__name__} has no router that {option} could be applied to", fix)
    for router in found.readable if options.bias_update_rate else ():
        check_bias(router)


def _check_losses(router: Router, aux: float, z: float) -> None:
    if aux and router.balance is None:
        problem = f"no load-balancing loss is defined for the scoring function of {router.name}"
        raise ModelError(problem, "set aux_loss_coef of the router options to 0")
    if z and router.balance == "identity":
        problem = f"{router.name} returns probabilities, and a z-loss needs logits"
        raise ModelError(problem, "set z_loss_coef of the router options to 0")
