"""The routers of a model: where they are, how they score, and whether they have a correction bias."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from veomni.models.traits.verdict import Verdict
from veomni.models.transformers_api.experts import router_logits
from veomni.moe.router_trial import RouterFinding, examine_router, kind_of
from veomni.moe.scoring import ScoreFunction, Scoring

if TYPE_CHECKING:
    from veomni.models.traits.trial import Trial


@dataclass(frozen=True)
class RoutingDecision:
    """What a router decided for its tokens.

    Attributes:
        logits: ``[tokens, experts]``.
        weights: ``[tokens, top_k]``.
        indices: int64 ``[tokens, top_k]``, the experts that each token is sent to.
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


@dataclass(frozen=True, eq=False)
class Router:
    """One router of a model.

    Attributes:
        name: Its name in the model.
        module: The module.
        experts: How many experts it chooses from.
        top_k: How many it chooses for a token.
        positions: Where in its output logits, weights and indices are.
        scoring: How weights come from logits; None where no known formula gives them.
        balance: What a load-balancing loss averages over tokens; None where none is defined.
        bias: The module that has the correction bias and the bias' name in it; None without one.
        hooks: What is called with every decision, in this order, once the router is hooked.
    """

    name: str
    module: nn.Module
    experts: int
    top_k: int
    positions: tuple[int, int, int]
    scoring: Scoring | None
    balance: ScoreFunction | None
    bias: tuple[nn.Module, str] | None
    hooks: list[RouterHook] = field(default_factory=list)


@dataclass(frozen=True)
class Routers:
    """The routers of a model.

    Attributes:
        readable: Those whose decisions can be read, in the order of the model.
        unreadable: The names of the others.
    """

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
    readable, unreadable = [], []
    for name, module, logits_at in list(router_logits(model)) or _beside_experts(model):
        block = model.get_submodule(name.rpartition(".")[0])
        kind = kind_of(module, block, logits_at)
        if kind not in known:
            known[kind] = examine_router(model, module, block, logits_at)
        finding = known[kind]
        if finding is None:
            unreadable.append(name)
        else:
            readable.append(_router(name, module, block, finding))
    return Routers(tuple(readable), tuple(unreadable))


def _router(name: str, module: nn.Module, block: nn.Module, finding: RouterFinding) -> Router:
    bias: tuple[nn.Module, str] | None = None
    if finding.bias is not None:
        path, attribute = finding.bias
        bias = (block if path is None else module.get_submodule(path)), attribute
    return Router(
        name, module, finding.experts, finding.top_k, finding.positions, finding.scoring, finding.balance, bias
    )


def _beside_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield the routers of models that record no ``router_logits``: next to a module called ``experts``."""
    for name, block in model.named_modules():
        children = dict(block.named_children())
        for kind in ("gate", "router") if "experts" in children else ():
            if kind in children:
                yield f"{name}.{kind}", children[kind], 0
