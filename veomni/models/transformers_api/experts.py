"""Mixture-of-experts layers: their implementations, routers and load-balancing loss."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from veomni.models.transformers_api.capabilities import is_pretrained

EXPERTS_IMPLEMENTATION = "_experts_implementation"
"""The attribute of a configuration that names the function for experts."""


def has_experts(model: nn.Module) -> bool:
    """Return whether a model's experts go through transformers' experts interface."""
    return is_pretrained(model) and bool(model._can_set_experts_implementation())  # type: ignore[operator]


def register_experts(name: str, function: Callable[..., Tensor]) -> None:
    """Register an experts implementation with transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(name, function)


def apply_gate(module: nn.Module, rows: Tensor) -> Tensor:
    """Return what an experts module makes of gate and up projections ``[rows, 2 * intermediate]``."""
    return module._apply_gate(rows)  # type: ignore[operator]


def router_logits(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield (name, router, where in its output its logits are) of what a model records as ``router_logits``."""
    seen: set[int] = set()
    for prefix, owner in model.named_modules():
        if not is_pretrained(owner):
            continue
        found = (getattr(owner, "_can_record_outputs", None) or {}).get("router_logits", ())
        for recorder in found if isinstance(found, list | tuple) else [found]:
            if getattr(recorder, "target_class", None) is None:
                continue
            for name, module in owner.named_modules(prefix=prefix):
                named = recorder.layer_name is None or recorder.layer_name in name
                if isinstance(module, recorder.target_class) and named and id(module) not in seen:
                    seen.add(id(module))
                    yield name, module, int(recorder.index)


def own_balance_loss(model: nn.Module) -> float | None:
    """Return the weight of the load-balancing loss that a transformers model would add to its own; None without."""
    config: Any = getattr(model, "config", None)
    for part in (config, config.get_text_config()) if is_pretrained(model) else ():
        if getattr(part, "output_router_logits", False):
            return float(getattr(part, "router_aux_loss_coef", 0.0))
    return None


def balances_on_softmax(model: nn.Module) -> bool:
    """Whether transformers defines a load-balancing loss for a model; it is always one of the softmax of the logits."""
    return hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func")
