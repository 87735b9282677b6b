"""The losses of an optimizer step over all ranks: of every part of a model, and of every source of the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from veomni.batch.counts import sources_of
from veomni.batch.fields import component_tokens
from veomni.batch.micro_batch import MicroBatch
from veomni.errors import ModelError
from veomni.loop.step import StepBatch
from veomni.parallel.mesh import ParallelState


def shared_loss(loss: Tensor | Mapping[str, Tensor], micro: MicroBatch, batch: StepBatch) -> Tensor:
    """Return a micro-batch's part of the step's mean loss; parts are remembered in the batch."""
    if isinstance(loss, Tensor):
        return loss * _share("text", micro, batch)
    shares = {name: part * _share(name, micro, batch) for name, part in loss.items()}
    for name, part in shares.items():
        batch.losses[name] = batch.losses.get(name, torch.zeros_like(batch.loss)) + part.detach()
    return torch.stack(list(shares.values())).sum()


def _share(name: str, micro: MicroBatch, batch: StepBatch) -> float:
    """Return which share a micro-batch has of what a part's loss is the mean over."""
    if name == "text":
        return micro.weight / (batch.loss_weight or 1.0)
    if name not in batch.part_tokens:
        raise ModelError(
            f"a loss called {name!r} is the mean over nobody knows how many tokens",
            "register a key with Field(counts=...) that tells them (veomni/batch/fields.py)",
        )
    return component_tokens(micro.inputs)[name] / max(1, batch.part_tokens[name])


def summed_parts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the sums by name over micro-batches; every known part is in it, also without any."""
    total = component_tokens({})
    for one in counts:
        total = {name: total[name] + one[name] for name in total}
    return total


def part_losses(batch: StepBatch, state: ParallelState) -> dict[str, Tensor]:
    """Return the mean loss of every part over its tokens of the step, equal on all ranks; see ``Launcher``."""
    names = sorted(batch.losses)
    if not names:
        return {}
    means = torch.stack([batch.losses[name] for name in names])
    dist.all_reduce(means, group=state.group("loss"))
    return {f"loss_{name}": mean for name, mean in zip(names, means, strict=True)}


def source_metrics(batch: StepBatch, state: ParallelState) -> dict[str, float | int | None]:
    """Return what a mixture's sources have in the step, equal on all ranks; see ``Launcher``."""
    sources = sources_of(batch.micro_batches)
    if len(sources) < 2:
        return {}
    counts = torch.tensor(list(sources.values()), dtype=torch.float64).T / state.size("sequence")
    losses = batch.source_sums
    numbers = torch.cat([torch.zeros(2, len(sources)) if losses is None else losses.cpu(), counts])
    dist.all_reduce(numbers)  # as ranks agree before a step: small, in float64, on the CPU
    found: dict[str, float | int | None] = {}
    for name, (loss, learned, documents, tokens) in zip(sources, numbers.T.tolist(), strict=True):
        if losses is not None:
            found[f"source_loss/{name}"] = loss / learned if learned else None
        found |= {f"source_samples/{name}": round(documents), f"source_tokens/{name}": round(tokens)}
    return found
