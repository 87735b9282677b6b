"""The losses of an optimizer step over all ranks: of every component of a model, and of every source of the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from veomni.batch.counts import sources_of
from veomni.batch.fields import component_tokens
from veomni.batch.micro_batch import MicroBatch
from veomni.errors import ModelError
from veomni.models.adapter.adapter import ModelAdapter
from veomni.models.adapter.passes.loss_context import LossContext
from veomni.parallel.mesh import ParallelState

if TYPE_CHECKING:
    from veomni.loop.step import ModelStep


@contextmanager
def loss_context(model: nn.Module, micro: MicroBatch) -> Iterator[LossContext]:
    """Provide the loss of ``model``, inside the context, with what the model does not pass on to it."""
    loss = ModelAdapter.of(model).loss
    if loss is None:
        if micro.targets.loss_weights is not None:
            problem = f"the batch has loss_weights, and {type(model).__name__} computes its loss itself"
            raise ModelError(problem, "leave the weights out of the data, or give each token 0 or 1")
        yield LossContext()
        return
    loss.context = LossContext.of(micro)
    try:
        yield loss.context
    finally:
        loss.context = LossContext()


def shared_loss(loss: Tensor | Mapping[str, Tensor], micro: MicroBatch, step: ModelStep) -> Tensor:
    """Return a micro-batch's share of the step's mean loss; those of components are added to ``step.losses``."""
    if isinstance(loss, Tensor):
        return _share("text", loss, micro, step)
    shares = {name: _share(name, each, micro, step) for name, each in loss.items()}
    for name, share in shares.items():
        step.losses[name] = step.losses.get(name, torch.zeros_like(step.loss)) + share.detach()
    return torch.stack(list(shares.values())).sum()


def _share(name: str, loss: Tensor, micro: MicroBatch, step: ModelStep) -> Tensor:
    """Return a loss times the micro-batch's share of what the component's loss is the mean over."""
    key = f"components.{name}"
    if name != "text" and key not in step.totals:
        fix = "register a field with Field(counts=...) that counts its tokens (veomni/batch/fields.py)"
        raise ModelError(f"loss {name!r} has no token count", fix)
    mine = micro.weight if name == "text" else component_tokens(micro.inputs)[name]
    if not mine:  # the mean over nothing may be NaN
        return loss.nan_to_num() * 0.0
    return loss * (mine / (step.total if name == "text" else step.totals[key]))


def component_losses(step: ModelStep, state: ParallelState) -> dict[str, Tensor]:
    """Return the mean loss of every component over its tokens of the step; see ``Launcher.global_losses``."""
    names = sorted(step.losses)
    if not names:
        return {}
    means = torch.stack([step.losses[name] for name in names])
    dist.all_reduce(means, group=state.group("loss"))
    return {f"loss_{name}": mean for name, mean in zip(names, means, strict=True)}


def source_metrics(step: ModelStep, state: ParallelState) -> dict[str, float | int | None]:
    """Return what a mixture's sources have in the step; see ``Launcher.source_metrics``."""
    sources = sources_of(step.micro_batches)
    if len(sources) < 2:
        return {}
    step.check_complete()
    counts = torch.tensor(list(sources.values()), dtype=torch.float64).T / state.size("sequence")
    losses = None if step.source_copy is None else step.source_copy.read()
    numbers = torch.cat([torch.zeros(2, len(sources)) if losses is None else losses, counts])
    dist.all_reduce(numbers)  # as ranks agree before a step: small, in float64, on the CPU
    found: dict[str, float | int | None] = {}
    for name, (loss, supervised, documents, tokens) in zip(sources, numbers.T.tolist(), strict=True):
        if losses is not None:
            found[f"source_loss/{name}"] = loss / supervised if supervised else None
        found |= {f"source_samples/{name}": round(documents), f"source_tokens/{name}": round(tokens)}
    return found
