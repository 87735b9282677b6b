"""The training loss of language models: the mean over supervised tokens, fused with the head where that is exact."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veomni.batch.fields import IGNORE_INDEX, shift_left
from veomni.batch.forward_call import ForwardCall, current_call
from veomni.errors import ModelError
from veomni.families.record import family_record
from veomni.logging import create_logger
from veomni.models.adapter.adapter import InputPass, ModelAdapter, Stage
from veomni.models.adapter.passes.loss_context import LossContext, Predictions
from veomni.models.traits import FusesHead
from veomni.models.transformers_api.construction import LOSS_FUNCTION
from veomni.ops.loss.cross_entropy import cross_entropy_sum, linear_cross_entropy_sum
from veomni.parallel.wrappers import wide_dtype

logger = create_logger(__name__)


class TokenMeanLoss:
    """What ``model.loss_function`` is replaced by: cross-entropy averaged over this micro-batch's supervised tokens.

    Where these have weights, it is the weighted mean, ``sum(weight * loss) / sum(weight)``. A micro-batch without any
    gives zero with zero gradients, not NaN. On the fused path the ``head`` returns its hidden states, and the
    projection is done in here, which is right only where nothing happens in between:
    :class:`~veomni.models.traits.FusesHead`. The caller of the model sets the ``context``: what the loss of the current
    micro-batch depends on beside labels.
    """

    def __init__(self, head: nn.Linear | None) -> None:
        self.head = head
        self.context = LossContext()

    def __call__(
        self, logits: Tensor, labels: Tensor, *args: Any, shift_labels: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Return the mean loss of ``[batch, seq, vocab]``, on the fused path of hidden states ``[batch, seq, hidden]``.

        ``shift_labels`` are used instead of ``labels`` when given, to this function or to the model.
        """
        call = current_call() or ForwardCall()
        if shift_labels is None:
            shift_labels, call.shift_labels = call.shift_labels, None
        targets = shift_left(labels, IGNORE_INDEX) if shift_labels is None else shift_labels
        targets = targets.reshape(-1).to(logits.device)
        rows, context = logits.flatten(0, -2), self.context
        wide = wide_dtype(rows.dtype)
        weights = None if context.token_weights is None else context.token_weights.reshape(-1).to(wide)
        each = None if context.source_ids is None else torch.empty(len(targets), dtype=wide, device=rows.device)
        best = torch.empty_like(targets) if context.predicts else None
        if call.fused:
            assert self.head is not None
            total = linear_cross_entropy_sum(rows, self.head.weight, targets, self.head.bias, each, weights, best)
        else:
            total = cross_entropy_sum(rows, targets, each, weights, best)
        if best is not None:
            context.predictions = Predictions(best, targets)
        kept = targets != IGNORE_INDEX
        if each is not None:
            context.add_by_source(each, kept, weights)
        if weights is None:
            return total / kept.sum().clamp(min=1)
        weight = weights.where(kept, 0.0).sum()
        return total / weight.where(weight > 0, 1.0)


def install_token_loss(model: nn.Module, *, fused: bool) -> None:
    """Replace the loss of a transformers causal language model on this instance; other models are left alone.

    ``fused`` fuses head and loss where that is exact, and logs where it is not.
    """
    adapter = ModelAdapter.of(model)
    owner: Any = model.get_submodule(getattr(model, "loss_component", ""))  # of a composed model its foundation
    # GPT2LMHeadModel and others have no loss type: transformers gives them the causal loss.
    causal = getattr(owner, "loss_type", None) in (None, "ForCausalLM", "ForConditionalGeneration")
    if not (causal and hasattr(owner, "loss_function")) or _predicts_labels_in_place(owner):
        return
    if family_record(getattr(owner, "config", None)).loss_in_forward:
        logger.info_rank0("the loss of %s is taken on its logits, not in its forward", type(owner).__name__)
        adapter.loss = TokenMeanLoss(None)
        adapter.add(TakeLossOver(adapter.loss), on=owner)
        return
    verdict = adapter.traits[FusesHead]
    if fused and not verdict.ok:
        logger.warning_rank0("the loss is not fused with the head: %s", verdict.reason)
    head = owner.get_output_embeddings() if fused and verdict.ok else None
    adapter.loss = TokenMeanLoss(head)
    adapter.patch(owner, LOSS_FUNCTION, adapter.loss)
    adapter.add(PassToLoss(type(owner).__name__, fused=head is not None), on=owner)
    if head is not None:
        adapter.patch(head, "forward", _PassOrProject(head.forward))


def _predicts_labels_in_place(model: nn.Module) -> bool:
    """Whether a model is an encoder-decoder that computes its loss in its forward, on labels that are not shifted."""
    called = inspect.unwrap(type(model).forward).__code__.co_names
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "loss_function" not in called


class TakeLossOver(InputPass):
    """Takes the loss on the logits of a model whose own loss would be NaN where nothing is supervised."""

    stage = Stage.LOSS

    def __init__(self, loss: TokenMeanLoss) -> None:
        self.loss = loss
        self.labels: Tensor | None = None

    def before(self, call: ForwardCall) -> None:
        """Keep the labels from the model."""
        self.labels, call.shift_labels = call.kwargs.pop("labels", None), call.kwargs.pop("shift_labels", None)

    def after(self, call: ForwardCall, output: Any) -> Any:
        """Compute the loss."""
        labels, self.labels = self.labels, None
        if labels is not None:
            output.loss = self.loss(output.logits, labels)
        return output


class PassToLoss(InputPass):
    """Brings past a model's forward what its loss takes: ``shift_labels``, and hidden states if ``fused``."""

    stage = Stage.LABELS

    def __init__(self, name: str, fused: bool) -> None:
        self.name, self.fused = name, fused

    def before(self, call: ForwardCall) -> None:
        """Take the shifted labels, and choose the fused path."""
        call.shift_labels = call.kwargs.pop("shift_labels", None)
        call.fused = self.fused and call.kwargs.get("labels") is not None

    def after(self, call: ForwardCall, output: Any) -> Any:
        """Return no logits where the head made none, and reject another loss, computed without the shifted labels."""
        if call.shift_labels is not None and getattr(output, "loss", None) is not None:
            problem = f"{self.name} computes its own loss, and would shift labels that are shifted already"
            fix = "use no sequence parallelism: leave out Ulysses and ContextParallel, or set their size to 1"
            raise ModelError(problem, fix)
        if call.fused and getattr(output, "logits", None) is not None:
            output.logits = None
        return output


class DropBalanceLoss(InputPass):
    """Keeps a transformers model from adding a load-balancing loss of its own; its configuration is not changed."""

    stage = Stage.LOSS

    def before(self, call: ForwardCall) -> None:
        """Let the model return no logits of routers, which is what it takes that loss on."""
        call.kwargs["output_router_logits"] = False


class _PassOrProject:
    def __init__(self, project: Callable[[Tensor], Tensor]) -> None:
        self.project = project

    def __call__(self, hidden: Tensor) -> Tensor:
        call = current_call()
        return hidden if call is not None and call.fused else self.project(hidden)
