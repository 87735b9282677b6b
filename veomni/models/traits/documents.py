"""Whether a model keeps the documents of a packed row apart."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from veomni.models.traits.inputs import FIRST, LENGTH, displacement, influence
from veomni.models.traits.sequence_layers import layer_outside_attention
from veomni.models.traits.trial import Trial
from veomni.models.traits.verdict import Verdict
from veomni.models.transformers_api.capabilities import is_pretrained


class PassesDocuments:
    """Two documents in a row do not see each other, and are computed the same in either order."""

    says: ClassVar[str] = "keeps the documents of a packed row apart"
    fix: ClassVar[str] = "set packing to none, so that every row is one document"

    def examine(self, trial: Trial) -> Verdict:
        """Run two documents, change a token of the first, and exchange them."""
        if not (is_pretrained(trial.subject) and hasattr(trial.subject.config, "vocab_size")):
            return Verdict(True, f"{trial.name} is not a language model of transformers: it is not run")
        if not trial.takes("input_ids", "position_ids"):
            return Verdict(False, f"{trial.name} takes no position_ids, which separate documents")
        carried = carried_state(trial.subject)
        if not carried.ok:
            return carried
        with trial.attention():
            return trial.attempt(_examine, f"{trial.name} does not run on packed tokens alone")


def carried_state(model: nn.Module) -> Verdict:
    """Return whether no layer of a model carries a state along the row."""
    layer = layer_outside_attention(model)
    return Verdict(not layer, f"{layer} carries state from one document of a packed row into the next" if layer else "")


def _examine(trial: Trial) -> Verdict:
    tokens, other = trial.tokens()
    positions = torch.cat([torch.arange(FIRST), torch.arange(LENGTH - FIRST)]).to(trial.device)

    def run(tokens: Tensor, positions: Tensor) -> Tensor:
        starts = (positions == 0).nonzero().flatten().tolist()
        boundaries = torch.tensor([*starts, LENGTH], dtype=torch.int32, device=trial.device)
        return trial.outputs(
            tokens, positions,
            cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries, max_length_q=LENGTH, max_length_k=LENGTH,
        )  # fmt: skip

    seen = influence(run, tokens, other, positions, slice(FIRST, None))
    if seen > 1:
        return Verdict(False, f"{trial.name} lets the documents of a packed row see each other", seen)
    moved = displacement(run, tokens, positions)
    if moved > 1:
        return Verdict(False, f"{trial.name} computes a document by its place in the row", moved)
    return Verdict(True, measured=max(seen, moved))
