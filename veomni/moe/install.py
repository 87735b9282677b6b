"""Give a model a controller of its routers."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from veomni.errors import ModelError
from veomni.logging import create_logger
from veomni.models.adapter.adapter import ModelAdapter
from veomni.models.adapter.passes.token_loss import DropBalanceLoss
from veomni.models.transformers_api.experts import own_balance_loss
from veomni.moe.controller import RouterController
from veomni.moe.options import MoEOptions
from veomni.moe.router_hooks import hook_routers
from veomni.moe.routers import Routers, RouterScoring, find_routers
from veomni.parallel.mesh import ParallelState

logger = create_logger(__name__)


def install_controller(
    model: nn.Module, options: MoEOptions, state: ParallelState, device: torch.device, dtype: torch.dtype
) -> RouterController | None:
    """Hook the routers of a model and put their controller into its adapter; a model without any has none.

    The model is not recomputed, compiled or sharded yet, and will run on ``device``; losses are summed in ``dtype``. An
    option that cannot be applied to this model is a ModelError.
    """
    adapter = ModelAdapter.of(model)
    examined = adapter.traits and adapter.traits.get(RouterScoring)
    found: Routers = examined.found if examined else find_routers(model)
    own, aux = own_balance_loss(model), options.aux_loss_coef
    if own is not None and found.readable and not found.unreadable:
        aux = own if aux is None else aux
        adapter.add(DropBalanceLoss())
        logger.info_rank0("the model's own load-balancing loss, taken on each rank's tokens alone, is off; the one "
                          "taken on the global batch has weight %s", aux)  # fmt: skip
    elif own:
        logger.warning_rank0("the model adds its own load-balancing loss, taken on each rank's tokens alone: "
                             "the decisions of its routers cannot be read")  # fmt: skip
    for option, problem in _problems(model, found, replace(options, aux_loss_coef=aux or 0.0), options.needs_routers):
        hint = ", and aux_loss_coef to balance with a loss" if option == "bias_update_rate" and found.readable else ""
        raise ModelError(problem, f"set {option} of the router options to 0{hint}")
    if not found.readable:
        return None
    for undo in hook_routers(found):
        adapter.on_remove(undo)
    controller = RouterController(found, replace(options, aux_loss_coef=aux or 0.0), state, device, dtype)
    adapter.routers = controller
    return controller


def _problems(model: nn.Module, found: Routers, options: MoEOptions, given: str | None) -> Iterator[tuple[str, str]]:
    """Yield the options that cannot be applied to a model's routers, and why; ``given`` needs routers at all."""
    if given and found.unreadable:
        yield given, f"what {found.unreadable[0]} of {type(model).__name__} decides cannot be read"
    elif given and not found.readable:
        yield given, f"{type(model).__name__} has no router that {given} could be applied to"
    for router in found.readable:
        if options.bias_update_rate and router.bias is None:
            name = f"{router.name} ({type(router.module).__name__})"
            yield "bias_update_rate", f"{name} has no correction bias that bias_update_rate could move"
        if options.aux_loss_coef and router.balance is None:
            problem = f"no load-balancing loss is defined for the scoring function of {router.name}"
            yield "aux_loss_coef", problem
        if options.z_loss_coef and router.balance == "identity":
            yield "z_loss_coef", f"{router.name} returns probabilities, and a z-loss needs logits"
