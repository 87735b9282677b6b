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

from veomni.batch import SEQUENCE_SIZE
from veomni.errors import ModelError
from veomni.ops.ulysses_attention import local_options

_LENGTH = 12
_ROTATION = 5
_NAME = "veomni_pointwise"
_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}
_FIX = "set train.ulysses_parallel_size and train.context_parallel_size to 1"


def refuse_unsplittable(model: nn.Module, body: Any, size: int) -> None:
    """Check that a model whose attention was installed for row parts computes on a part what it does on the row.

    Args:
        model: What users call; its parameters have values.
        body: The transformers model inside.
        size: Ranks that share a row.

    Raises:
        ModelError: it does not; says what was seen.
    """
    probe = _Probe(size)
    installed = body.config.get_text_config()._attn_implementation
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
            _run_installed(model.eval(), body, size)
    finally:
        model.train(training)


def use_attention(body: Any, name: str) -> None:
    """Make the text part of a transformers model run with the attention called ``name``; towers keep theirs."""
    parts = [key for key in body.config.sub_configs if getattr(body.config, key, None) is body.config.get_text_config()]
    body.set_attn_implementation({parts[0]: name} if parts else name)


class _Probe:
    """Attention that treats every position by itself, and remembers how it was called."""

    def __init__(self, size: int) -> None:
        self.size = size
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
        if query.shape[2] != _LENGTH or key.shape[2] != _LENGTH:
            raise ModelError(
                f"{name} attends with {query.shape[2]} queries to {key.shape[2]} keys, not position to position", _FIX
            )
        if isinstance(mask, Tensor) and mask.shape[-2:] != (_LENGTH * self.size, _LENGTH * self.size):
            raise ModelError(f"{name} is given a mask that the model builds by itself (ALiBi, or a bias)", _FIX)
        local_options(kwargs, slice(None))


def _weigh(heads: Tensor) -> Tensor:
    # Uneven weights: rotary embeddings keep lengths and even sums.
    weights = torch.linspace(-1, 2, heads.shape[-1], dtype=heads.dtype, device=heads.device)
    return (heads * weights).mean(-1, keepdim=True)


def _try(model: nn.Module, body: Any, probe: _Probe) -> None:
    config = body.config.get_text_config()
    tokens = (torch.arange(_LENGTH, device=body.device) * 7 + 3) % config.vocab_size
    positions = torch.arange(_LENGTH, device=body.device)
    name = type(body).__name__

    def run(tokens: Tensor, positions: Tensor) -> Tensor:
        return _output(model, tokens, positions, probe.size, name)

    reference = run(tokens, positions)
    if not probe.calls:
        raise ModelError(f"the attention of {name} does not go through transformers' attention interface", _FIX)
    tolerance = _TOLERANCE[reference.dtype] * float(reference.abs().max())
    changed = tokens.clone()
    changed[_ROTATION] = (tokens[_ROTATION] + 1) % config.vocab_size
    moved = (run(changed, positions) - reference).abs().amax(-1)
    moved[_ROTATION] = 0
    if not bool((moved <= tolerance).all()):
        raise ModelError(f"{name} lets positions see each other outside attention", _FIX)
    rotated = run(tokens.roll(_ROTATION), positions.roll(_ROTATION))
    if not bool(((rotated - reference.roll(_ROTATION, 0)).abs() <= tolerance).all()):
        raise ModelError(f"{name} does not take the place of a token from position_ids alone", _FIX)


def _run_installed(model: nn.Module, body: Any, size: int) -> None:
    # What the attention itself refuses is refused now, and not in the first step.
    positions = torch.arange(_LENGTH, device=body.device)
    installed = body.config.get_text_config()._attn_implementation
    name = f"{type(body).__name__} with attention {installed}"
    _output(model, positions % body.config.get_text_config().vocab_size, positions, size, name)


def _output(model: nn.Module, tokens: Tensor, positions: Tensor, size: int, name: str) -> Tensor:
    inputs = {"input_ids": tokens[None], "position_ids": positions[None], SEQUENCE_SIZE: size, "use_cache": False}
    try:
        output = model(**inputs)
    except ModelError:
        raise
    except Exception as error:  # whatever a model's own forward raises, it cannot be given parts of rows
        problem = f"{name} does not run on parts of rows ({type(error).__name__}: {str(error)[:160]})"
        raise ModelError(problem, _FIX) from error
    values: Tensor = output.logits if getattr(output, "logits", None) is not None else output[0]
    return values[0]
