"""Record which experts a forward chose, and make another forward choose them again, as reinforcement learning needs.

Between the engine that sampled a text and the model that is trained on it, rounding alone sends some tokens to other
experts (arXiv:2510.11370). The weights of the chosen ones follow from the logits, so that gradients reach the router.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from veomni.batch.split import SequenceShard
from veomni.compat.modules import in_backward
from veomni.errors import DataError, ModelError
from veomni.models import unwrap
from veomni.moe.router_hooks import hooked_routers
from veomni.moe.routers import Router, RouterHook, RouterScoring, RoutingDecision


@dataclass
class RoutingLog:
    """The choices of a model's routers.

    Attributes:
        forwards: For every forward, by the name of the router, int16 ``[tokens, top_k]`` on whatever device they were
            made: ``tokens`` counts the positions of the micro-batch row by row, padding included.
    """

    forwards: list[dict[str, Tensor]] = field(default_factory=list)

    def save(self, path: Path | str) -> None:
        """Write a safetensors file, with one tensor a forward and router."""
        from safetensors.torch import save_file

        tensors = {
            f"{number}.{name}": indices.cpu().contiguous()
            for number, forward in enumerate(self.forwards)
            for name, indices in forward.items()
        }
        save_file(tensors, str(path))

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what :meth:`save` wrote, to the CPU; another file is a DataError."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        forwards: dict[int, dict[str, Tensor]] = {}
        try:
            for key, indices in load_file(str(path)).items():
                number, _, name = key.partition(".")
                forwards.setdefault(int(number), {})[name] = indices
        except (OSError, SafetensorError, ValueError) as error:
            problem = f"{path} is no recorded routing: {error}"
            raise DataError(problem, "give a file that RoutingLog.save wrote") from error
        return cls([forwards[number] for number in sorted(forwards)])

    def shard(self, shard: SequenceShard, batch_sizes: Sequence[int]) -> RoutingLog:
        """Return what one of the ranks that share rows has to replay of a log of whole rows.

        ``shard`` is ``launcher.sequence_shard``; ``batch_sizes`` are the rows of every forward.
        """
        forwards = zip(self.forwards, batch_sizes, strict=True)
        return RoutingLog([{name: _cut(x, shard, rows) for name, x in forward.items()} for forward, rows in forwards])


def _cut(indices: Tensor, shard: SequenceShard, rows: int) -> Tensor:
    whole = indices.unflatten(0, (rows, -1))
    return whole[:, shard.indices(whole.shape[1]).to(indices.device)].flatten(0, 1)


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingLog]:
    """Record the choices of every forward of ``model`` inside the context; a recomputed one is not recorded again.

    ``model`` is a transformers model, or what ``launcher.setup_model`` returned for one; a ModelError where it has no
    routers that can be read.
    """
    log = RoutingLog()
    with _attached(_Record(log), model):
        yield log


@contextmanager
def replay_routing(model: nn.Module, log: RoutingLog) -> Iterator[None]:
    """Make the forwards of ``model`` inside the context choose the experts of the log's, one after another.

    It is exact under activation checkpointing too, as long as every forward is followed by its backward. ``model`` is
    as for :func:`record_routing`; one whose weights do not follow from its logits is a ModelError too. A log of other
    routers, experts or tokens, or of fewer forwards, is a DataError.
    """
    with _attached(_Replay(log), model) as routers:
        _check(log, routers)
        yield


class _Record(RouterHook):
    def __init__(self, log: RoutingLog) -> None:
        self.log = log

    def begin(self, module: nn.Module, args: object) -> None:
        self.log.forwards.append({})

    @override
    def observe(self, router: Router, decision: RoutingDecision, training: bool) -> None:
        if self.log.forwards and not in_backward():
            self.log.forwards[-1][router.name] = decision.indices.to(torch.int16)


class _Replay(RouterHook):
    number = -1
    waiting = 0  # forwards whose backward has not begun

    def __init__(self, log: RoutingLog) -> None:
        self.log = log

    def begin(self, module: nn.Module, args: object) -> None:
        self.number += 1
        self.waiting += torch.is_grad_enabled()
        if self.number >= len(self.log.forwards):
            problem = f"the recorded routing holds {len(self.log.forwards)} forwards, and the model runs one more"
            raise DataError(problem, "record as many forwards as are replayed")

    @override
    def choose(self, router: Router, decision: RoutingDecision) -> Tensor | None:
        if in_backward() and self.waiting > 1:
            raise DataError(
                f"{self.waiting} forwards were replayed before the first backward, which recomputes one of them",
                "run the backward of a micro-batch before the next forward, or train without activation checkpointing",
            )
        if in_backward():
            self.waiting = 0
        indices = self.log.forwards[self.number][router.name]
        if indices.shape != decision.indices.shape:
            raise DataError(
                f"the recorded choice of {router.name} is {list(indices.shape)} and the forward makes one of "
                f"{list(decision.indices.shape)} [tokens, top_k] (forward {self.number} of the log)",
                "replay the micro-batches that were recorded, in their order (RoutingLog.shard cuts shared rows)",
            )
        return indices.to(decision.indices.device, decision.indices.dtype)


@contextmanager
def _attached(hook: _Record | _Replay, model: nn.Module) -> Iterator[tuple[Router, ...]]:
    """Return the routers of a model; inside the context ``hook`` is called with its forwards and their decisions."""
    body = unwrap(model)
    with hooked_routers(body) as found:
        if found.unreadable or not found.readable:
            which = found.unreadable[0] if found.unreadable else type(body).__name__
            problem = f"the routing of {which} can be neither recorded nor replayed: it has no router that can be read"
            raise ModelError(problem, RouterScoring.fix)
        handle = body.register_forward_pre_hook(hook.begin)
        for router in found.readable:
            router.hooks.append(hook)
        try:
            yield found.readable
        finally:
            handle.remove()
            for router in found.readable:
                router.hooks.remove(hook)


def _check(log: RoutingLog, routers: Sequence[Router]) -> None:
    unknown = next((router for router in routers if router.scoring is None), None)
    if unknown is not None:
        raise ModelError(
            f"how {unknown.name} ({type(unknown.module).__name__}) weighs experts is not known: its choice cannot be "
            "replaced",
            "train this model without replay",
        )
    experts = {router.name: router.experts for router in routers}
    for number, forward in enumerate(log.forwards):
        odd, problem = sorted(forward.keys() ^ experts.keys()), None
        if odd:
            problem = f"and the model do not have the same routers: {odd[0]}"
        for name, indices in forward.items() if not odd else ():
            if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < experts[name]:
                largest = int(indices.max())
                problem = f"sends tokens of {name} to experts up to {largest}, and there are {experts[name]}"
        if problem is not None:
            problem = f"forward {number} of the recorded routing {problem}"
            raise DataError(problem, "replay on the architecture that was recorded")
