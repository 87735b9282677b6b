"""The routers of a model: where they are, how they score, and whether they have a correction bias."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from veomni.models.traits.trial import Trial, Verdict
from veomni.models.transformers_api.experts import router_logits
from veomni.moe.router_trial import RouterFinding, examine_router, kind_of


@dataclass(frozen=True)
class RoutingDecision:
    """What a router decided for its tokens.

    Logits are ``[tokens, experts]``; weights, and the int64 indices of the chosen experts, ``[tokens, top_k]``.
    """

    logits: Tensor
    weights: Tensor
    indices: Tensor


class RouterHook:
    """Called with the decisions of routers, and may change what follows from them; the base class does neither."""

    def choose(self, router: Router, decision: RoutingDecision) -> Tensor | None:
        """Return the experts that tokens are sent to instead, int64 ``[tokens, top_k]``."""
        return None

    def observe(self, router: Router, decision: RoutingDecision, training: bool) -> None:
        """Read a decision; ``training`` is whether gradients will be computed."""
        return

    def gradient(self, router: Router, logits: Tensor) -> Tensor | None:
        """Return what a loss on the logits adds to their gradient, ``[tokens, experts]``; called in the backward."""
        return None


@dataclass(frozen=True, eq=False, kw_only=True)
class Router(RouterFinding):
    """One router of a model, and what was found about its kind.

    ``index`` is its place among the readable routers of the model; ``bias`` the module that has the correction bias,
    and the bias' name in it. ``hooks`` are called with every decision, in this order, once the router is hooked.
    """

    name: str
    module: nn.Module
    index: int
    bias: tuple[nn.Module, str] | None
    hooks: list[RouterHook] = field(default_factory=list)

    @property
    def bias_values(self) -> Tensor:
        """The correction bias, ``[experts]`` in some shape; only where there is one."""
        assert self.bias is not None
        values: Tensor = getattr(*self.bias)
        return values

    @torch.no_grad()
    def move_bias(self, assignments: Tensor, rate: float) -> None:
        """Add ``rate`` to the bias of experts with less than the mean load, and take it from those with more.

        It balances without a loss (arXiv:2408.15664, section 3). ``assignments``, int64 ``[experts]``, are the tokens
        sent to each expert in the step, over all ranks.
        """
        bias = self.bias_values
        below_mean = (assignments.sum() - assignments * len(assignments)).sign()  # in integers, so that equal is equal
        step = (rate * below_mean.to(bias.dtype)).view(bias.shape).to(bias.device)
        if isinstance(bias, DTensor):
            step = distribute_tensor(step, bias.device_mesh, bias.placements, src_data_rank=None)
        bias.add_(step)


@dataclass(frozen=True)
class Routers:
    """The routers of a model: those whose decisions can be read, in its order, and the names of the others."""

    readable: tuple[Router, ...] = ()
    unreadable: tuple[str, ...] = ()


class RouterScoring:
    """The decisions of all routers can be read; ``found`` are its :class:`Routers`."""

    says: ClassVar[str] = "has routers whose decisions can be read"
    fix: ClassVar[str] = "use a mixture-of-experts model whose routers return logits, weights and experts"

    def examine(self, trial: Trial) -> Verdict:
        """Run a copy of each kind of router on random hidden states."""
        found = find_routers(trial.subject)
        reason = f"what {found.unreadable[0]} of {trial.name} decides cannot be read" if found.unreadable else ""
        return Verdict(not reason, reason, found=found)


def find_routers(model: nn.Module) -> Routers:
    """Return the routers of a transformers model; its parameters may be on the meta device, and are not sharded yet."""
    known: dict[Any, RouterFinding | None] = {}
    readable: list[Router] = []
    unreadable: list[str] = []
    for name, module, logits_at in list(router_logits(model)) or _beside_experts(model):
        block = model.get_submodule(name.rpartition(".")[0])
        kind = kind_of(module, block, logits_at)
        if kind not in known:
            known[kind] = examine_router(model, module, block, logits_at)
        finding = known[kind]
        if finding is None:
            unreadable.append(name)
            continue
        path, bias = finding.bias_path, None
        if path is not None:
            bias = (block if path[0] is None else module.get_submodule(path[0])), path[1]
        readable.append(Router(name=name, module=module, index=len(readable), bias=bias, **vars(finding)))
    return Routers(tuple(readable), tuple(unreadable))


def _beside_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield the routers of models that record no ``router_logits``: next to a module called ``experts``."""
    for name, block in model.named_modules():
        children = dict(block.named_children())
        for kind in ("gate", "router") if "experts" in children else ():
            if kind in children:
                yield f"{name}.{kind}", children[kind], 0
