"""The only writer on a model: passes around its forward and replaced attributes, all of which can be undone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from enum import IntEnum, auto
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from veomni.batch.forward_call import ForwardCall, SequenceGroups, current_call, forward_call
from veomni.batch.micro_batch import MicroBatch
from veomni.models.transformers_api.attention import restoring_implementations
from veomni.parallel.wrappers import unwrap

if TYPE_CHECKING:
    from veomni.models.adapter.passes.token_loss import TokenMeanLoss
    from veomni.ops.encoders.towers import TowerCall

_ATTRIBUTE = "_veomni_adapter"


class Stage(IntEnum):
    """The order in which passes see a call; they leave it in reverse."""

    PRECISION = auto()
    SEQUENCE = auto()
    DOCUMENTS = auto()
    LABELS = auto()
    MEDIA = auto()
    LOSS = auto()


class InputPass:
    """What happens around every forward of a module."""

    stage: ClassVar[Stage]

    def before(self, call: ForwardCall) -> None:
        """Read the call, and change its arguments in place."""

    def after(self, call: ForwardCall, output: Any) -> Any:
        """Return what the module returns instead of ``output``; not called where the forward failed."""
        return output

    def close(self, call: ForwardCall) -> None:
        """Undo what :meth:`before` changed outside of the call; always called."""


@dataclass
class _Site:
    """One module with passes: the pair of hooks on it."""

    adapter: ModelAdapter
    module: nn.Module
    passes: list[InputPass] = field(default_factory=list)
    entered: list[ExitStack] = field(default_factory=list)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        outer = current_call()
        if outer is not None and outer.owner is self.adapter and module is not self.adapter.model:
            call = replace(outer, args=args, kwargs=dict(kwargs))
        else:
            call = ForwardCall(self.adapter, args, dict(kwargs), MicroBatch.of_call(kwargs), self.adapter.sequence)
        stack = ExitStack()
        self.entered.append(stack)
        stack.enter_context(forward_call(call))
        for each in self.passes:
            stack.callback(each.close, call)
            each.before(call)
        return call.args, call.kwargs

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.entered:  # a hook before this one's failed
            return output
        with self.entered.pop():
            call = current_call()
            assert call is not None
            for each in reversed(self.passes) if output is not None else ():
                output = each.after(call, output)
        call.args, call.kwargs = (), {}  # a recomputation binds the call, and must not keep its inputs alive
        return output


class ModelAdapter:
    """Everything that was changed about one model.

    Attributes:
        model: The module inside of wrappers.
        sequence: The ranks that share the model's rows; None where rows are whole.
        attention_open: Whether the choice of attention was left to the library.
        experts: The backend that experts were requested to run with.
        weights: Directories with safetensors, by the part of the model ("" is all of it); the rest is random.
        towers: How each modality is encoded, by its name.
        traits: What the examination of the model found.
        loss: The loss that the model computes; None where it is its own.
        routers: What balances and reports the model's routers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sequence: SequenceGroups | None = None
        self.attention_open = False
        self.experts = "auto"
        self.weights: dict[str, Path] = {}
        self.towers: dict[str, TowerCall] = {}
        self.traits: Any = None
        self.loss: TokenMeanLoss | None = None
        self.routers: Any = None
        self._undo: list[Callable[[], None]] = [restoring_implementations(model)]
        self._sites: list[_Site] = []
        self._site(model)

    @classmethod
    def of(cls, model: nn.Module) -> ModelAdapter:
        """Return the adapter of a model, wrapped or not; a model without one is given one that changes nothing."""
        root = unwrap(model)
        found: ModelAdapter | None = vars(root).get(_ATTRIBUTE)
        if found is None:
            found = cls(root)
            setattr(root, _ATTRIBUTE, found)
        return found

    @property
    def passes(self) -> list[InputPass]:
        """All passes: those of the root, then those of modules inside it, each in the order of stages."""
        return [each for site in self._sites for each in site.passes]

    def add(self, each: InputPass, on: nn.Module | None = None) -> None:
        """Add a pass around the forward of a module, None being the model; of one stage, what came first goes first."""
        site = self._site(self.model if on is None else on)
        site.passes = sorted([*site.passes, each], key=lambda one: one.stage)

    def _site(self, module: nn.Module) -> _Site:
        site = next((site for site in self._sites if site.module is module), None)
        if site is None:
            site = _Site(self, module)
            self._sites.append(site)
            self.hook(module, site.enter, before=True, with_kwargs=True)
            self.hook(module, site.leave, always_call=True)
        return site

    def patch(self, owner: Any, attribute: str, replacement: Any) -> None:
        """Replace an attribute until :meth:`remove`; ``owner`` is a module, its configuration or an object in it."""
        self._undo.append(replace_attribute(owner, attribute, replacement))

    def hook(self, module: nn.Module, hook: Callable[..., Any], *, before: bool = False, **options: Any) -> None:
        """Register a hook on a module inside the model, after its forward or before it; ``options`` are torch's."""
        register = module.register_forward_pre_hook if before else module.register_forward_hook
        self._undo.append(register(hook, **options).remove)

    def on_remove(self, undo: Callable[[], None]) -> None:
        """Call ``undo`` in :meth:`remove`, before what was changed earlier is undone."""
        self._undo.append(undo)

    def remove(self) -> nn.Module:
        """Undo all changes, the last one first, and return the plain model.

        Parameters stay where a strategy put them: experts that ranks share can be saved, and not called any more.
        """
        while self._undo:
            self._undo.pop()()
        delattr(self.model, _ATTRIBUTE)
        return self.model


def replace_attribute(owner: Any, attribute: str, replacement: Any) -> Callable[[], None]:
    """Replace an attribute of a module, or of an object in a model; the function that is returned brings it back."""
    own, undo = vars(owner), partial(delattr, owner, attribute)
    if attribute in own:
        undo = partial(setattr, owner, attribute, own[attribute])
    setattr(owner, attribute, replacement)
    return undo
