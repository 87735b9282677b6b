"""What a pass over held-out data adds up to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from veomni.batch.counts import sources_of, token_weight
from veomni.batch.documents import document_numbers
from veomni.batch.fields import IGNORE_INDEX, component_tokens
from veomni.batch.micro_batch import MicroBatch
from veomni.batch.split import SequenceShard
from veomni.errors import ModelError
from veomni.parallel.mesh import ParallelState

if TYPE_CHECKING:
    from veomni.metrics import AnswerAccuracy
    from veomni.models import LossContext


class Evaluation:
    """Adds up losses and right answers, of all held-out data and of each source of a mixture.

    Args:
        state: Says which ranks share rows, and which have rows of their own.
        shard: Which positions of its rows this rank holds.
        device: Where losses are.
        answers: Whether answers are counted.
    """

    def __init__(self, state: ParallelState, shard: SequenceShard, device: torch.device, *, answers: bool) -> None:
        from veomni.metrics import TokenPerplexity

        self._state, self._shard, self._device, self.answers = state, shard, device, answers
        self._loss = TokenPerplexity(process_group=state.group("loss")).to(device)
        self._parts = {
            name: TokenPerplexity(process_group=state.group("loss")).to(device) for name in component_tokens({})
        }
        self._sources: tuple[str, ...] = ()
        self._source_sums = torch.zeros(2, 0, dtype=torch.float64, device=device)
        self._accuracy: AnswerAccuracy | None = None
        self._seen: set[str] = set()

    def add(self, micro: MicroBatch, output: Any, told: LossContext) -> None:
        """Add a micro-batch.

        Args:
            micro: This rank's shard of it, on the CPU.
            output: What the model returned; a composed model's losses by part.
            told: What its loss was told.

        Raises:
            ModelError: answers are counted, and the model takes its loss by itself.
        """
        losses = dict(getattr(output, "losses", {"text": output.loss}))
        weight, tokens = token_weight(micro), component_tokens(micro.inputs)
        self._loss.update(losses.pop("text") * weight, weight)
        for name, loss in losses.items():
            self._parts[name].update(loss * tokens[name], tokens[name])
            self._seen.add(name)
        self._know(tuple(sources_of([micro])))
        if told.by_source is not None:
            self._source_sums = self._source_sums + told.by_source.sums
        if self.answers:
            if told.predictions is None:
                raise ModelError(
                    f"{type(output).__name__}: the model takes its loss by itself, and nobody sees what it predicts",
                    "evaluate without answers",
                )
            self._count(micro, told.predictions.tokens, told.predictions.targets)

    def _know(self, names: tuple[str, ...]) -> None:
        if self._accuracy is not None:
            return
        from veomni.metrics import AnswerAccuracy

        self._sources = names if len(names) > 1 else ()
        self._source_sums = self._source_sums.new_zeros(2, len(self._sources))
        groups = max(1, len(self._sources))
        self._accuracy = AnswerAccuracy(groups, process_group=self._state.group("loss")).to(self._device)

    def _count(self, micro: MicroBatch, tokens: Tensor, targets: Tensor) -> None:
        assert self._accuracy is not None
        numbers = document_numbers(micro.inputs, micro.rows).flatten().to(self._device)
        learned = targets != IGNORE_INDEX
        wrong_and_learned = torch.zeros(2, len(micro.rows.document_lengths), dtype=torch.int64, device=self._device)
        amounts = torch.stack([learned & (tokens != targets), learned]).long()
        wrong_and_learned = wrong_and_learned.index_add(1, numbers[learned], amounts[:, learned])
        if self._shard.size > 1:  # an answer may lie on several of the ranks that share a row: each of them counts it
            dist.all_reduce(wrong_and_learned, group=self._state.group("sequence"))
        sources = micro.origin.document_sources if self._sources else ()
        group = torch.tensor(sources, dtype=torch.int64, device=self._device) if sources else None
        wrong, supervised = wrong_and_learned
        self._accuracy.update(wrong, supervised, group)

    def compute(self) -> dict[str, float]:
        """Return ``eval_loss``, ``perplexity`` and ``eval_accuracy``, equal on all ranks.

        Of a composed model, also ``eval_loss_NAME`` for each decoder; of a mixture, ``eval_loss/NAME`` and
        ``eval_accuracy/NAME`` for each source.
        """
        found = self._loss.compute()
        metrics = {"eval_loss": found["loss"], "perplexity": found["perplexity"]}
        metrics |= {f"eval_loss_{name}": self._parts[name].compute()["loss"] for name in sorted(self._seen)}
        if self._sources:
            dist.all_reduce(self._source_sums, group=self._state.group("loss"))
            losses, weights = self._source_sums
            metrics |= _by_name("eval_loss", self._sources, losses / weights)
        if self.answers and self._accuracy is not None:
            right = self._accuracy.compute()
            metrics |= {"eval_accuracy": right["accuracy"]}
            metrics |= _by_name("eval_accuracy", self._sources, right["by_group"])
        return {name: float(value) for name, value in metrics.items()}


def _by_name(metric: str, names: tuple[str, ...], values: Tensor) -> dict[str, Tensor]:
    return {f"{metric}/{name}": value for name, value in zip(names, values.reshape(-1), strict=False)}
