"""The training loss of language models: the mean over supervised tokens, fused with the head where that is exact.

The fused path lets the head pass hidden states through and does the projection inside the loss. It is right only when
nothing happens between head and loss (Gemma 2 caps logits, Cohere scales them), so the model's own forward is run once
around a stand-in for its body: if the loss receives the very tensor the head returned, the two can be fused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veomni.batch.fields import IGNORE_INDEX
from veomni.batch.shift import shift_left
from veomni.errors import ModelError
from veomni.logging import create_logger
from veomni.models.adapter.passes.loss_context import LossContext, Predictions
from veomni.models.transformers_api.loss import LOSS_FUNCTION, computes_loss_itself
from veomni.ops.loss.cross_entropy import cross_entropy_sum, linear_cross_entropy_sum

logger = create_logger(__name__)


class TokenMeanLoss:
    """What ``model.loss_function`` is replaced by: cross-entropy averaged over this micro-batch's supervised tokens.

    Where these have weights, it is the weighted mean, ``sum(weight * loss) / sum(weight)``. A micro-batch without any
    gives zero with zero gradients, not NaN.

    Args:
        head: The projection to the vocabulary when it is fused with the loss, or None.

    Attributes:
        context: What is known of the tokens of the micro-batch in hand; whoever calls the model sets it.
    """

    def __init__(self, head: nn.Linear | None) -> None:
        self.head = head
        self.pending = False
        self.targets: Tensor | None = None
        self.context = LossContext()

    def __call__(
        self, logits: Tensor, labels: Tensor, *args: Any, shift_labels: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Return the mean loss.

        Args:
            logits: ``[batch, seq, vocab]``, or hidden states ``[batch, seq, hidden]`` on the fused path.
            labels: ``[batch, seq]``, unshifted.
            args: What else the model passes (the vocabulary's size).
            shift_labels: ``[batch, seq]``, already shifted; used instead of ``labels`` when given. Those given to the
                model itself arrive here whatever the model passes on.
            kwargs: What else the model passes.
        """
        if shift_labels is None:
            shift_labels, self.targets = self.targets, None
        targets = shift_left(labels, IGNORE_INDEX) if shift_labels is None else shift_labels
        targets = targets.reshape(-1).to(logits.device)
        rows, context = logits.flatten(0, -2), self.context
        wide = torch.float64 if rows.dtype is torch.float64 else torch.float32
        weights = None if context.token_weights is None else context.token_weights.reshape(-1).to(wide)
        each = None if context.by_source is None else torch.empty(len(targets), dtype=wide, device=rows.device)
        best = torch.empty_like(targets) if context.predicts else None
        if self.pending:
            assert self.head is not None
            total = linear_cross_entropy_sum(rows, self.head.weight, targets, self.head.bias, each, weights, best)
        else:
            total = cross_entropy_sum(rows, targets, each, weights, best)
        if best is not None:
            context.predictions = Predictions(best, targets)
        if context.by_source is not None and each is not None:
            context.by_source.add(each, targets, weights)
        kept = targets != IGNORE_INDEX
        if weights is None:
            return total / kept.sum().clamp(min=1)
        weight = weights.where(kept, 0.0).sum()
        return total / weight.where(weight > 0, 1.0)


def install_token_loss(model: nn.Module, *, fused: bool) -> TokenMeanLoss | None:
    """Replace the loss of a transformers causal language model on this instance; other models are left alone.

    Args:
        model: The model, before it is sharded.
        fused: Fuse head and loss where that is exact; say so in the log where it is not.

    Returns:
        The loss, or None for a model that is left alone.
    """
    part = getattr(model, "loss_part", None)
    if part is not None:  # a composed model: its language foundation takes the loss
        return install_token_loss(model.get_submodule(part), fused=fused)
    if not hasattr(model, "loss_function"):
        return None
    # GPT2LMHeadModel and others have no loss type: transformers gives them the causal loss.
    if getattr(model, "loss_type", None) not in (None, "ForCausalLM", "ForConditionalGeneration"):
        return None
    if computes_loss_itself(model):
        logger.info_rank0(
            "%s computes its loss in its forward: it is taken on its logits instead", type(model).__name__
        )
        plain = TokenMeanLoss(None)
        _take_loss_over(model, plain)
        return plain
    head = model.get_output_embeddings() if fused else None  # type: ignore[operator]
    reason = _why_not_fused(model, head) if fused else None
    if reason:
        logger.warning_rank0("the loss is not fused with the head: %s", reason)
        head = None
    loss = TokenMeanLoss(head)
    model.loss_function = loss  # type: ignore[assignment]
    _pass_shifted_labels(model, loss)
    if head is not None:
        _pass_hidden_states(model, head, loss)
    return loss


def _why_not_fused(model: nn.Module, head: Any) -> str | None:
    if type(head) is not nn.Linear:
        return f"the head is a {type(head).__name__}, not a Linear"
    try:
        touched = _logits_are_touched(model, head)
    except Exception as error:  # whatever a model's own forward raises, the plain loss is right
        return f"the model's forward does not run around a stand-in ({type(error).__name__}: {str(error)[:120]})"
    return "the model changes its logits after the head" if touched else None


class _BodyOutput:
    """What a model's body returns, with nothing in it but hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        return self.last_hidden_state


def _logits_are_touched(model: nn.Module, head: nn.Linear) -> bool:
    body: nn.Module = model.base_model  # type: ignore[assignment]
    returned: list[Tensor] = []
    received: list[Tensor] = []

    def receive(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        received.append(logits)
        return logits.sum()

    weight = head.weight
    hidden = torch.zeros(1, 4, head.in_features, dtype=weight.dtype, device=weight.device)
    tokens = torch.zeros(1, 4, dtype=torch.int64, device=weight.device)
    hook = head.register_forward_hook(lambda module, args, output: returned.append(output))
    body.forward = lambda *args, **kwargs: _BodyOutput(hidden)
    model.loss_function = receive  # type: ignore[assignment]
    try:
        with torch.no_grad():
            model(input_ids=tokens, labels=tokens)
    finally:
        hook.remove()
        del body.forward
        delattr(model, LOSS_FUNCTION)
    return not (len(returned) == len(received) == 1 and returned[0] is received[0])


def _take_loss_over(model: nn.Module, loss: TokenMeanLoss) -> None:
    """Keep labels from a forward that would average over them by itself, NaN where there are none."""
    held: list[Tensor | None] = [None]

    def hold(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        held[0], loss.targets = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        return args, kwargs

    def take(module: nn.Module, args: Any, output: Any) -> None:
        labels, held[0] = held[0], None
        if labels is not None:
            output.loss = loss(output.logits, labels)

    model.register_forward_pre_hook(hold, with_kwargs=True)
    model.register_forward_hook(take)


def _pass_shifted_labels(model: nn.Module, loss: TokenMeanLoss) -> None:
    """Bring ``shift_labels`` past the model's forward, which need not know them, to the loss."""

    def announce(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        loss.targets = kwargs.pop("shift_labels", None)
        return args, kwargs

    def retire(module: nn.Module, args: Any, output: Any) -> None:
        left, loss.targets = loss.targets, None
        if left is not None and getattr(output, "loss", None) is not None:
            raise ModelError(
                f"{type(model).__name__} computes its loss by itself, and would shift labels that are shifted already",
                "set train.ulysses_parallel_size and train.context_parallel_size to 1",
            )

    model.register_forward_pre_hook(announce, with_kwargs=True)
    model.register_forward_hook(retire)


def _pass_hidden_states(model: nn.Module, head: nn.Linear, loss: TokenMeanLoss) -> None:
    project = head.forward

    def announce(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        loss.pending = kwargs.get("labels") is not None

    def retire(module: nn.Module, args: Any, output: Any) -> None:
        if loss.pending:
            loss.pending = False
            if getattr(output, "logits", None) is not None:
                output.logits = None  # these are hidden states: nobody may take them for logits

    def pass_or_project(hidden: Tensor) -> Tensor:
        return hidden if loss.pending else project(hidden)

    setattr(head, "forward", pass_or_project)  # noqa: B010  (mypy takes no assignment to a method)
    model.register_forward_pre_hook(announce, with_kwargs=True)
    model.register_forward_hook(retire, always_call=True)
