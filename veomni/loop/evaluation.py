"""What a pass over held-out data adds up to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from veomni.batch.counts import label_count, sources_of, token_weight
from veomni.batch.documents import document_numbers
from veomni.batch.fields import IGNORE_INDEX, component_tokens
from veomni.batch.micro_batch import MicroBatch
from veomni.errors import ModelError
from veomni.launch.world import World
from veomni.loop.losses import loss_context
from veomni.loop.step import forward
from veomni.loop.step_reader import listed, shard
from veomni.models.adapter.adapter import ModelAdapter
from veomni.strategies import Strategy

if TYPE_CHECKING:
    from veomni.metrics import AnswerAccuracy, TokenPerplexity
    from veomni.models.adapter.passes.loss_context import LossContext

Measure = Callable[[nn.Module, MicroBatch], Tensor | Mapping[str, Tensor]]
"""Runs a model on a micro-batch and returns means over it: its loss, or numbers by name ("loss", "accuracy")."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    world: World,
    strategies: Sequence[Strategy],
    *,
    answers: bool,
    measure: Measure | None,
) -> dict[str, float]:
    """Return what ``model`` makes of a held-out loader; see ``Launcher.evaluate``."""
    total = Evaluation(model, world, answers=answers, measure=measure)
    training = model.training
    model.eval()
    for batch in loader:
        for micro in listed(batch):
            total.add(shard(micro, strategies, world.state))
    model.train(training)
    return total.compute()


class Evaluation:
    """Adds up losses and correct answers, of all held-out data and of each source of a mixture.

    Args:
        model: What ``Launcher.setup_model`` returned.
        world: The mesh, and where losses are.
        answers: Whether answers are counted.
        measure: Computes the numbers instead of the model's own loss.
    """

    def __init__(self, model: nn.Module, world: World, *, answers: bool, measure: Measure | None = None) -> None:
        self.model, self._state, self._device, self.answers = model, world.state, world.device, answers
        self._measure = measure
        self._shifts = ModelAdapter.of(model).loss is not None
        self._means: dict[str, TokenPerplexity] = {"loss": self._mean()}
        if measure is None:
            self._means |= {f"loss_{name}": self._mean() for name in component_tokens({})}
        self._sources: tuple[str, ...] = ()
        self._source_sums = torch.zeros(2, 0, dtype=torch.float64, device=self._device)
        self._accuracy: AnswerAccuracy | None = None
        self._seen: set[str] = {"loss"}

    def _mean(self) -> TokenPerplexity:
        from veomni.metrics import TokenPerplexity

        return TokenPerplexity(process_group=self._state.group("loss")).to(self._device)

    def add(self, held: MicroBatch) -> None:
        """Run the model on a micro-batch, and add up what it makes of it.

        Args:
            held: This rank's shard, on the CPU.

        Raises:
            ModelError: answers are counted, and the model computes its loss itself; or it or ``measure`` returns none.
        """
        micro = held.to(self._device)
        weight = token_weight(held) if self._shifts else label_count(held)
        with loss_context(self.model, micro) as context:
            context.predicts = self.answers
            if self._measure is not None:
                found = self._measure(self.model, micro)
                if not isinstance(found, (Tensor, Mapping)) or (isinstance(found, Tensor) and found.numel() != 1):
                    given = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                    raise ModelError(
                        f"evaluate's loss= returned {given}", "return a mean, a 0-d tensor, or means by name"
                    )
                means = {"loss": found} if isinstance(found, Tensor) else dict(found)
                weights = dict.fromkeys(means, float(weight))
            else:
                means, weights = self._own_losses(forward(self.model, micro), held, weight)
        for name, mean in means.items():
            if name not in self._means:
                self._means[name] = self._mean()
            self._means[name].update(mean * weights[name], weights[name])
            self._seen.add(name)
        self._learn_sources(tuple(sources_of([held])))
        if context.by_source is not None:
            self._source_sums = self._source_sums + context.by_source.sums
        if self.answers:
            self._count(held, context)

    def _own_losses(self, output: Any, held: MicroBatch, weight: float) -> tuple[dict[str, Tensor], dict[str, float]]:
        loss = getattr(output, "loss", None)
        if loss is None:
            raise ModelError(
                f"{type(self.model).__name__} returned no loss to evaluate",
                "give the data labels, or give evaluate(..., loss=function(model, micro))",
            )
        components = dict(getattr(output, "losses", {"text": loss}))
        means = {"loss": components.pop("text"), **{f"loss_{name}": each for name, each in components.items()}}
        tokens = {f"loss_{name}": float(count) for name, count in component_tokens(held.inputs).items()}
        return means, {"loss": weight, **tokens}

    def _learn_sources(self, names: tuple[str, ...]) -> None:
        if self._accuracy is not None:
            return
        from veomni.metrics import AnswerAccuracy

        self._sources = names if len(names) > 1 else ()
        self._source_sums = self._source_sums.new_zeros(2, len(self._sources))
        groups = max(1, len(self._sources))
        self._accuracy = AnswerAccuracy(groups, process_group=self._state.group("loss")).to(self._device)

    def _count(self, held: MicroBatch, context: LossContext) -> None:
        if context.predictions is None:
            raise ModelError(
                f"predictions of {type(self.model).__name__} are unavailable: it computes its loss itself",
                "evaluate without answers",
            )
        assert self._accuracy is not None
        tokens, targets = context.predictions.tokens, context.predictions.targets
        numbers = document_numbers(held.inputs, held.rows).flatten().to(self._device)
        supervised = targets != IGNORE_INDEX
        counts = torch.zeros(2, len(held.rows.document_lengths), dtype=torch.int64, device=self._device)
        amounts = torch.stack([supervised & (tokens != targets), supervised]).long()
        counts = counts.index_add(1, numbers[supervised], amounts[:, supervised])
        if held.rows.shard.size > 1:  # an answer may lie on several of the ranks that share a row: each counts it
            dist.all_reduce(counts, group=self._state.group("sequence"))
        sources = held.origin.document_sources if self._sources else ()
        group = torch.tensor(sources, dtype=torch.int64, device=self._device) if sources else None
        self._accuracy.update(counts[0], counts[1], group)

    def compute(self) -> dict[str, float]:
        """Return the means as ``eval_NAME``, equal on all ranks; see ``Launcher.evaluate``; collective."""
        found = {name: self._means[name].compute() for name in ["loss", *sorted(self._seen - {"loss"})]}
        metrics = {f"eval_{name}": values["loss"] for name, values in found.items()}
        if self._shifts:
            metrics["perplexity"] = found["loss"]["perplexity"]
        if self._sources:
            dist.all_reduce(self._source_sums, group=self._state.group("loss"))
            losses, weights = self._source_sums
            metrics |= _by_name("eval_loss", self._sources, losses / weights)
        if self.answers and self._accuracy is not None:
            correct = self._accuracy.compute()
            metrics |= {"eval_accuracy": correct["accuracy"]}
            metrics |= _by_name("eval_accuracy", self._sources, correct["by_group"])
        return {name: float(value) for name, value in metrics.items()}


def _by_name(metric: str, names: tuple[str, ...], values: Tensor) -> dict[str, Tensor]:
    return {f"{metric}/{name}": value for name, value in zip(names, values.reshape(-1), strict=False)}
