"""Whether a model keeps the documents of a row apart, and computes on a shard of a row what it does on the whole.

Another token in one place must change no place that it is to be kept from, and rotating tokens and position ids must
rotate the output. State spaces, convolutions, trained mixing and positions that a model counts fail one of the two.
"""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from veomni.models.adapter.adapter import ModelAdapter
from veomni.models.traits.attention import LENGTH, NO_SHARDS, POINTWISE, SHARDS, calls
from veomni.models.traits.trial import NoCopyError, Trial, Verdict
from veomni.models.transformers_api.attention import text_attention_of
from veomni.models.transformers_api.capabilities import is_pretrained

FIRST = 5
"""Length of the first of two documents, and by how much a row is rotated."""
_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_STATE_PARAMETERS = {"A_log", "dt_bias"}


class PassesDocuments:
    """Two documents in a row do not see each other, and are computed the same in either order."""

    says: ClassVar[str] = "keeps the documents of a packed row apart"
    fix: ClassVar[str] = "set packing to none, so that every row is one document"

    def examine(self, trial: Trial) -> Verdict:
        """Run two documents, change a token of the first, and exchange them."""
        pretrained = is_pretrained(trial.subject)
        language = pretrained and hasattr(trial.subject.config, "vocab_size")
        if language and not trial.takes("input_ids", "position_ids"):
            return Verdict(False, f"{trial.name} takes no position_ids, which separate documents")
        carried = carried_state(trial.subject) if pretrained else Verdict(True)
        if not carried.ok:
            return carried
        if not language:
            return Verdict(True, f"{trial.name} is not a language model of transformers: it is not run")
        with trial.attention():
            return trial.attempt(self._run, f"{trial.name} does not run on packed tokens alone")

    def _run(self, trial: Trial) -> Verdict:
        def run(tokens: Tensor, positions: Tensor) -> Tensor:
            starts = (positions == 0).nonzero().flatten().tolist()
            boundaries = torch.tensor([*starts, LENGTH], dtype=torch.int32, device=trial.device)
            return trial.outputs(
                tokens, positions,
                cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries, max_length_q=LENGTH, max_length_k=LENGTH,
            )  # fmt: skip

        positions = torch.cat([torch.arange(FIRST), torch.arange(LENGTH - FIRST)]).to(trial.device)
        return _judged(
            trial, run, positions, [slice(FIRST, LENGTH)],
            f"{trial.name} lets the documents of a packed row see each other",
            f"{trial.name} computes a document by its place in the row",
        )  # fmt: skip


class SplitsRows:
    """Positions meet in attention only, and attention goes through transformers' interface."""

    says: ClassVar[str] = "can be computed on shards of rows"
    fix: ClassVar[str] = NO_SHARDS

    def examine(self, trial: Trial) -> Verdict:
        """Run the model with an attention that treats every position separately, so that all of the model must."""
        if not is_pretrained(trial.subject):
            return Verdict(False, f"{trial.name} is not a transformers model, so its attention cannot be replaced")
        if not trial.takes("input_ids", "position_ids"):
            return Verdict(False, f"{trial.name} takes no position_ids")
        layer = layer_outside_attention(trial.subject)
        if layer is not None:
            return Verdict(False, f"{trial.name} has a layer that sees the sequence outside attention: {layer}")
        with trial.attention(POINTWISE):
            return trial.attempt(self._run, f"{trial.name} does not run on shards of rows")

    def _run(self, trial: Trial) -> Verdict:
        def run(tokens: Tensor, positions: Tensor) -> Tensor:
            return trial.outputs(tokens, positions, shards=SHARDS)

        before = calls.get()
        verdict = _judged(
            trial, run, torch.arange(LENGTH, device=trial.device), [slice(FIRST - 1), slice(FIRST, LENGTH)],
            f"{trial.name} lets positions see each other outside attention",
            f"{trial.name} does not take the place of a token from position_ids alone",
        )  # fmt: skip
        if calls.get() == before:
            problem = f"the attention of {trial.name} does not go through transformers' attention interface"
            return Verdict(False, problem)
        return verdict


class RunsOnShards:
    """The model and its attention accept a shard of a row, on the ranks that share it."""

    says: ClassVar[str] = "runs on shards of rows"
    fix: ClassVar[str] = NO_SHARDS

    def examine(self, trial: Trial) -> Verdict:
        """Run one row of the model itself; collective."""
        if trial.itself is None:
            raise NoCopyError
        name = f"{trial.name} with attention {text_attention_of(trial.subject)}"
        return trial.attempt(self._run, f"{name} does not run on shards of rows")

    def _run(self, trial: Trial) -> Verdict:
        groups = ModelAdapter.of(trial.subject).sequence
        positions = torch.arange(LENGTH, device=trial.device)
        trial.outputs(trial.tokens()[0], positions, 1 if groups is None else groups.shard.size)
        return Verdict(True)


def carried_state(model: nn.Module) -> Verdict:
    """Return whether no layer of a model carries a state along the row."""
    layer = layer_outside_attention(model)
    return Verdict(not layer, f"{layer} carries state from one document of a packed row into the next" if layer else "")


def layer_outside_attention(model: nn.Module) -> str | None:
    """Return the name of a layer in the text part that carries something along the sequence: state space, convolution.

    It mixes the documents of a packed row, and its state does not reach a part of a row on another rank.
    """
    text = {id(module) for module in text_part(model).modules()}
    for name, module in model.named_modules():
        state = any(key in _STATE_PARAMETERS for key, _ in module.named_parameters(recurse=False))
        if id(module) in text and (state or (isinstance(module, nn.Conv1d) and module.kernel_size != (1,))):
            return f"{name} ({type(module).__name__})"
    return None


def text_part(model: nn.Module) -> nn.Module:
    """Return the text decoder of a transformers model, without encoders and head; other modules are returned whole."""
    decoder = getattr(model, "get_decoder", None)
    found = decoder() if callable(decoder) else None
    # In some models, get_decoder returns the head, a linear layer called "decoder".
    return found if isinstance(found, nn.Module) and hasattr(found, "config") else model


def _judged(
    trial: Trial, run: Callable[[Tensor, Tensor], Tensor], positions: Tensor, elsewhere: Sequence[slice], mixes: str,
    counts: str,
) -> Verdict:  # fmt: skip
    """Compare three runs of one row, from tokens ``[seq]`` and position ids ``[seq]`` to outputs ``[seq, channels]``.

    Another token at place ``FIRST - 1`` must change nothing ``elsewhere``: ``mixes`` is the reason where it does. That
    rotating tokens and position ids does more than rotate the outputs is the reason ``counts``.
    """
    tokens, other = trial.tokens()
    reference = run(tokens, positions)
    changed = tokens.clone()
    changed[FIRST - 1] = other
    influenced = run(changed, positions)
    seen = max(_difference(influenced[places], reference[places], reference) for places in elsewhere)
    if seen > 1:
        return Verdict(False, mixes)
    rotated = run(tokens.roll(-FIRST), positions.roll(-FIRST))
    moved = _difference(rotated, reference.roll(-FIRST, 0), reference)
    return Verdict(False, counts) if moved > 1 else Verdict(True)


def _difference(found: Tensor, expected: Tensor, scale: Tensor) -> float:
    """Return the largest difference in tolerances of the dtype."""
    errors = (found - expected).abs().amax(-1)
    # In half precision one rounding can choose another expert for a token; positions that really differ are many.
    error = errors.median() if found.dtype.itemsize == 2 else errors.max()
    limit = _TOLERANCE[found.dtype] * scale.abs().max()
    ratio = float(error / limit)
    return ratio if math.isfinite(ratio) else 0.0 if bool(error <= limit) else math.inf
