"""Whether the loss can do the projection of the head."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veomni.models.adapter.adapter import replace_attribute
from veomni.models.traits.trial import Trial, Verdict
from veomni.models.weights.slots import skeleton_of


class FusesHead:
    """Nothing happens between the head and the loss: Gemma 2 caps logits there, and Cohere scales them."""

    says: ClassVar[str] = "passes what its head returns to its loss"
    fix: ClassVar[str] = "set fused_loss to false"

    def examine(self, trial: Trial) -> Verdict:
        """Run the forward on the meta device around a stand-in for the body, and see what the loss receives."""
        model: Any = trial.subject.get_submodule(getattr(trial.subject, "loss_component", ""))  # of a composed model
        head = model.get_output_embeddings() if hasattr(model, "loss_function") else None
        if type(head) is not nn.Linear:
            return Verdict(False, f"the head is a {type(head).__name__}, not a Linear")
        try:
            untouched = _logits_reach_loss(skeleton_of(model))
        except Exception as error:  # whatever a model's own forward raises, the plain loss is right
            reason = f"{type(error).__name__}: {str(error)[:120]}"
            return Verdict(False, f"the model's forward does not run around a stand-in ({reason})")
        return Verdict(True) if untouched else Verdict(False, "the model changes its logits after the head")


class _BodyOutput:
    """What a model's body returns, with nothing in it but hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        return self.last_hidden_state


def _logits_reach_loss(copy: Any) -> bool:
    seen: list[Tensor] = []

    def receive(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(logits)
        return logits.sum()

    head = copy.get_output_embeddings()
    hidden = torch.zeros(1, 4, head.in_features, dtype=head.weight.dtype, device="meta")
    tokens = torch.zeros(1, 4, dtype=torch.int64, device="meta")
    head.register_forward_hook(lambda module, args, output: seen.append(output))
    replace_attribute(copy.base_model, "forward", lambda *args, **kwargs: _BodyOutput(hidden))
    copy.loss_function = receive
    with torch.no_grad():
        copy(input_ids=tokens, labels=tokens)
    return len(seen) == 2 and seen[0] is seen[1]
