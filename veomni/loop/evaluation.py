"""Means over held-out data, of all of it and of each source of a mixture."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from veomni.batch.counts import label_count, sources_of, token_weight
from veomni.batch.documents import document_numbers
from veomni.batch.fields import IGNORE_INDEX, component_tokens
from veomni.batch.micro_batch import MicroBatch
from veomni.errors import LoopError, ModelError
from veomni.launch.world import World
from veomni.loop.losses import loss_context
from veomni.loop.step import forward
from veomni.loop.step_reader import StepReader
from veomni.models.adapter.adapter import ModelAdapter
from veomni.models.adapter.passes.loss_context import LossContext, Predictions

if TYPE_CHECKING:
    from veomni.metrics.mean import WeightedMean

Measure = Callable[[nn.Module, MicroBatch], Tensor | Mapping[str, Tensor]]
"""Runs a model on a micro-batch and returns means over it: its loss, or numbers by name ("loss", "accuracy")."""


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Iterable[Any], world: World, *, answers: bool, measure: Measure | None
) -> dict[str, float]:
    """See ``Launcher.evaluate``."""
    evaluation, training = Evaluation(model, world, answers=answers, measure=measure), model.training
    reader, steps = StepReader(loader, world), 0
    model.eval()
    try:
        while step := reader.read(steps + 1):
            steps += 1
            for micro in step.micro_batches:
                evaluation.add(micro)
    finally:
        model.train(training)
    if not steps:
        raise LoopError("evaluate() was given an empty loader", "give it held-out data")
    return evaluation.compute()


class Evaluation:
    """Adds up losses and correct answers; the arguments are those of ``Launcher.evaluate``."""

    def __init__(self, model: nn.Module, world: World, *, answers: bool, measure: Measure | None) -> None:
        self._model, self._state, self._device = model, world.state, world.device
        self._answers, self._measure = answers, measure or model_losses
        self._shifts = ModelAdapter.of(model).loss is not None
        self._sources: tuple[str, ...] = ()
        self._means: dict[str, WeightedMean] = {}

    def _add(self, name: str, value: Tensor, weight: Tensor | float, groups: Tensor | None = None) -> None:
        from veomni.metrics.mean import WeightedMean

        if name not in self._means:
            group, sources = self._state.group("loss"), max(1, len(self._sources))
            self._means[name] = WeightedMean(sources, process_group=group).to(self._device)
        self._means[name].update(value, weight, groups)

    def add(self, held: MicroBatch) -> None:
        """Run the model on this rank's shard of a micro-batch, which is on the CPU, and add its numbers."""
        sources = tuple(sources_of([held]))
        self._sources = sources if len(sources) > 1 else ()
        micro = held.to(self._device)
        with loss_context(self._model, micro) as context:
            context.predicts = self._answers
            found = self._measure(self._model, micro)
        weight = token_weight(held) if self._shifts else label_count(held)
        tokens = component_tokens(held.inputs) if self._measure is model_losses else {}
        for name, mean in _by_name(found).items():
            self._add(name, mean, tokens.get(name.removeprefix("loss_"), weight))
        if self._sources and context.source_sums is not None:
            losses, weights = context.source_sums
            self._add("source_loss", losses / weights, weights, torch.arange(len(self._sources), device=self._device))
        if self._answers:
            self._count_answers(held, context)

    def _count_answers(self, held: MicroBatch, context: LossContext) -> None:
        if context.predictions is None:
            problem = f"predictions of {type(self._model).__name__} are unavailable: it computes its loss itself"
            raise ModelError(problem, "evaluate without answers")
        wrong, supervised = self._count_tokens(held, context.predictions)
        sources = held.origin.document_sources if self._sources else [0] * len(wrong)
        groups = torch.tensor(sources, dtype=torch.int64, device=self._device)
        self._add("accuracy", wrong == 0, supervised > 0, groups)

    def _count_tokens(self, held: MicroBatch, predictions: Predictions) -> Tensor:
        """Return how many supervised tokens of each document are predicted wrong, and how many it has."""
        numbers = document_numbers(held.inputs, held.rows).flatten().to(self._device)
        supervised = predictions.targets != IGNORE_INDEX
        counts = torch.zeros(2, len(held.rows.document_lengths), dtype=torch.int64, device=self._device)
        wrong = supervised & (predictions.tokens != predictions.targets)
        counts = counts.index_add(1, numbers[supervised], torch.stack([wrong, supervised]).long()[:, supervised])
        if held.rows.shard.size > 1:  # an answer may lie on several of the ranks that share a row: each counts it
            dist.all_reduce(counts, group=self._state.group("sequence"))
        return counts

    def compute(self) -> dict[str, float]:
        """Return the means as ``eval_NAME``, equal on all ranks; collective."""
        order = sorted(self._means, key=lambda name: (name != "loss", name))
        means = {name: self._means[name].compute().tolist() for name in order}
        by_source = {"loss": means.pop("source_loss", [])[1:], "accuracy": means.get("accuracy", [])[1:]}
        metrics: dict[str, float] = {f"eval_{name}": mean for name, (mean, *_) in means.items()}
        if self._shifts and "loss" in means:
            metrics["perplexity"] = float(torch.tensor(means["loss"][0], dtype=torch.float64).exp())
        for name, values in by_source.items():
            metrics |= {f"eval_{name}/{source}": value for source, value in zip(self._sources, values, strict=False)}
        return metrics


def model_losses(model: nn.Module, micro: MicroBatch) -> dict[str, Tensor]:
    """Return the loss of a model's output, "loss", and those of its other components as "loss_NAME"."""
    output = forward(model, micro)
    loss = getattr(output, "loss", None)
    if loss is None:
        problem = f"{type(model).__name__} returned no loss to evaluate"
        raise ModelError(problem, "give the data labels, or give evaluate(..., loss=function(model, micro))")
    components = getattr(output, "losses", {"text": loss})
    return {"loss" if name == "text" else f"loss_{name}": each for name, each in components.items()}


def _by_name(found: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if isinstance(found, Mapping):
        return found
    if not isinstance(found, Tensor) or found.numel() != 1:
        given = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ModelError(f"evaluate's loss= returned {given}", "return a mean, a 0-d tensor, or means by name")
    return {"loss": found}
