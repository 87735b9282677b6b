"""Experts that every token goes to, run while tokens are in flight to the other experts.

Most blocks call them after their other experts: they are run ahead, and returned when the block calls them. Some
blocks call them first: then the block's router runs at once, and tokens are dispatched before the shared experts run.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from typing_extensions import override

from veomni.compat.modules import in_backward
from veomni.compat.tensors import same_values
from veomni.ops.patch import PatchAttribute

_SHARED = ("shared_experts", "shared_expert", "shared_mlp")
_ROUTERS = ("gate", "router")


class _RunAhead:
    """A module that may run before its block calls it, which then gets the result for the same hidden states."""

    def __init__(self, module: nn.Module, patch: PatchAttribute) -> None:
        self._module, self.run = module, module.forward
        self._ahead: tuple[Tensor, Any] | None = None
        patch(module, "forward", self._called)

    def run_ahead(self, hidden: Tensor) -> Any:
        """Compute the result for ``[tokens, hidden]``; None where the module cannot run early."""
        # Calling a forward alone leaves FSDP's hooks out, which would gather the module's own parameters.
        if isinstance(self._module, FSDPModule):
            return None
        result = self.run(hidden)
        self._ahead = hidden, result
        return result

    def _called(self, hidden: Tensor) -> Any:
        ahead, self._ahead = self._ahead, None
        return ahead[1] if ahead is not None and same_values(ahead[0], hidden) else self.run(hidden)


class SharedExperts(_RunAhead):
    """The shared experts of a block; its first call shows which of the two orders it has.

    Their forward takes hidden states and nothing else. ``router`` chooses experts in the same block, None where it
    cannot run early; ``dispatch`` sends ``[tokens, hidden]`` to the experts of ``[tokens, k]``, and returns what is in
    flight.
    """

    def __init__(
        self, module: nn.Module, router: nn.Module | None, dispatch: Callable[[Tensor, Tensor], Any],
        patch: PatchAttribute = setattr,
    ) -> None:  # fmt: skip
        super().__init__(module, patch)
        self._router = _RunAhead(router, patch) if router is not None else None
        self._dispatch = dispatch
        self._called_first = self._send_early = False
        self._under_way: tuple[Tensor, Tensor, Any] | None = None

    @override
    def run_ahead(self, hidden: Tensor) -> Any:
        return None if self._called_first else super().run_ahead(hidden)

    def take_dispatch(self, hidden: Tensor, index: Tensor) -> Any | None:
        """Return the early dispatch of these tokens to these experts, or None."""
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return None
        tokens, experts, dispatch = under_way
        if same_values(tokens, hidden) and same_values(experts, index):
            return dispatch
        dispatch.cancel()
        return None

    @override
    def _called(self, hidden: Tensor) -> Any:
        if self._ahead is not None and same_values(self._ahead[0], hidden):
            result: Tensor = super()._called(hidden)
            return result.view(*hidden.shape[:-1], result.shape[-1])
        # Not from a recomputation on: operations of one must come in the order of its forward.
        self._send_early |= self._called_first and self._router is not None and not in_backward()
        if self._send_early:
            self._send_first(hidden.view(-1, hidden.shape[-1]))
        self._called_first = True
        return super()._called(hidden)

    def _send_first(self, tokens: Tensor) -> None:
        assert self._router is not None
        answer = self._router.run_ahead(tokens)
        found = [part for part in answer if _is_choice(part)] if isinstance(answer, tuple) else []
        if len(found) == 1:
            self._under_way = tokens, found[0], self._dispatch(tokens, found[0])


def shared_experts_beside(
    model: nn.Module, experts: str, dispatch: Callable[[Tensor, Tensor], Any], patch: PatchAttribute = setattr
) -> SharedExperts | None:
    """Return the shared experts of the block that holds the experts of that name, or None."""
    block = model.get_submodule(experts.rpartition(".")[0])
    found, routers = _children(block, _SHARED), _children(block, _ROUTERS)
    if len(found) != 1:
        return None
    return SharedExperts(found[0], routers[0] if len(routers) == 1 else None, dispatch, patch)


def _children(block: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """Return the children of these names whose forward takes hidden states and nothing else."""
    children = [child for name, child in block.named_children() if name in names]
    return [child for child in children if len(inspect.signature(child.forward).parameters) == 1]


def _is_choice(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dim() == 2 and part.dtype == torch.int64
