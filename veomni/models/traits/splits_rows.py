"""Find out whether a model can be split along the sequence, by asking the model.

With attention replaced by something that treats every position by itself, a model that only its attention lets see
other positions must treat every position by itself too, and must take a token's place in the row from ``position_ids``.
Two things are tried on a short row: another token at one place must change no other place, and rotating tokens and
position ids must rotate the output. State spaces, convolutions, learned mixing, positions that are counted by the model
itself, attention that goes around transformers' interface: all of them fail one of the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veomni.batch.documents import RowLayout
from veomni.batch.micro_batch import MicroBatch
from veomni.batch.split import SequenceShard
from veomni.errors import ModelError
from veomni.models.traits.trial import (
    FIRST,
    LENGTH,
    places_matter,
    seen_elsewhere,
    takes_positions,
    tokens_of,
    values_of,
)
from veomni.models.transformers_api.attention import text_attention_of
from veomni.ops.attention.text import use_attention
from veomni.ops.attention.ulysses import local_options

_NAME = "veomni_pointwise"
_FIX = "set train.ulysses_parallel_size and train.context_parallel_size to 1"


def refuse_unsplittable(model: nn.Module, body: Any, size: int, device: torch.device) -> None:
    """Check that a model whose attention was installed for row parts computes on a part what it does on the row.

    Args:
        model: What users call; its parameters have values.
        body: The transformers model inside.
        size: Ranks that share a row.
        device: Where the model computes.

    Raises:
        ModelError: it does not; says what was seen.
    """
    if not takes_positions(body):
        raise ModelError(f"{type(body).__name__} takes no position_ids", _FIX)
    probe = _Probe(size, device)
    installed = text_attention_of(body)
    probe.register()
    training = model.training
    use_attention(body, _NAME)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            _try(model.eval(), body, probe)
    finally:
        use_attention(body, installed)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            _run_installed(model.eval(), body, probe)
    finally:
        model.train(training)


class _Probe:
    """Attention that treats every position by itself, and remembers how it was called."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.calls = 0

    def register(self) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(_NAME, self)
        AttentionMaskInterface.register(_NAME, self.mask)

    def mask(
        self,
        *,
        batch_size: int,
        q_length: int,
        attention_mask: Tensor | None = None,
        device: Any = None,
        **options: Any,
    ) -> Tensor:
        length = q_length * self.size
        return torch.ones(batch_size, 1, length, length, dtype=torch.bool, device=device)

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        self.calls += 1
        self._check(module, query, key, attention_mask, kwargs)
        groups = query.shape[1] // key.shape[1]
        score = _weigh(query) + _weigh(key).repeat_interleave(groups, dim=1)
        return (value.repeat_interleave(groups, dim=1) * (1 + score)).transpose(1, 2).contiguous(), None

    def _check(self, module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> None:
        name = type(module).__name__
        if query.shape[2] != LENGTH or key.shape[2] != LENGTH:
            raise ModelError(
                f"{name} attends with {query.shape[2]} queries to {key.shape[2]} keys, not position to position", _FIX
            )
        if isinstance(mask, Tensor) and mask.shape[-2:] != (LENGTH * self.size, LENGTH * self.size):
            raise ModelError(f"{name} is given a mask that the model builds by itself (ALiBi, or a bias)", _FIX)
        local_options(kwargs, slice(None))


def _weigh(heads: Tensor) -> Tensor:
    # Uneven weights: rotary embeddings keep lengths and even sums.
    weights = torch.linspace(-1, 2, heads.shape[-1], dtype=heads.dtype, device=heads.device)
    return (heads * weights).mean(-1, keepdim=True)


def _try(model: nn.Module, body: Any, probe: _Probe) -> None:
    name, positions = type(body).__name__, torch.arange(LENGTH, device=probe.device)
    tokens, other = tokens_of(body.config, probe.device)

    def run(tokens: Tensor, positions: Tensor) -> Tensor:
        return _output(model, tokens, positions, probe.size, name)

    mixed = seen_elsewhere(run, tokens, other, positions, slice(FIRST, None))
    mixed = mixed or seen_elsewhere(run, tokens, other, positions, slice(0, FIRST - 1))
    if not probe.calls:
        raise ModelError(f"the attention of {name} does not go through transformers' attention interface", _FIX)
    if mixed:
        raise ModelError(f"{name} lets positions see each other outside attention", _FIX)
    if places_matter(run, tokens, positions):
        raise ModelError(f"{name} does not take the place of a token from position_ids alone", _FIX)


def _run_installed(model: nn.Module, body: Any, probe: _Probe) -> None:
    # What the attention itself refuses is refused now, and not in the first step.
    positions = torch.arange(LENGTH, device=probe.device)
    name = f"{type(body).__name__} with attention {text_attention_of(body)}"
    tokens, _ = tokens_of(body.config, probe.device)
    _output(model, tokens, positions, probe.size, name)


def _output(model: nn.Module, tokens: Tensor, positions: Tensor, size: int, name: str) -> Tensor:
    inputs = {"input_ids": tokens[None], "position_ids": positions[None], "use_cache": False}
    micro = MicroBatch(inputs, RowLayout(shard=SequenceShard(size)))
    try:
        output = model(**micro.inputs)
    except ModelError:
        raise
    except Exception as error:  # whatever a model's own forward raises, it cannot be given parts of rows
        problem = f"{name} does not run on parts of rows ({type(error).__name__}: {str(error)[:160]})"
        raise ModelError(problem, _FIX) from error
    return values_of(output)
