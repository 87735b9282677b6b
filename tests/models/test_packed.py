"""Documents packed into a row train exactly as they do alone: logits and every parameter's gradient, in float64.

Sliding windows (4) are shorter than the documents. The padded tail of the row is one more segment.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.models.layouts import CPU
from tests.models.tiny import TEXT_MODELS, tiny_config
from veomni.batch.documents import find_boundaries
from veomni.batch.micro_batch import MicroBatch
from veomni.models import Materializer, build_model

LENGTHS = (7, 12, 5)
TAIL = 4
SDPA_TOO = [name for name in TEXT_MODELS if name not in ("gemma2", "gpt_oss")]
CASES = [(name, "eager") for name in TEXT_MODELS] + [(name, "sdpa") for name in SDPA_TOO]


def double_model(name: str, attention: str) -> torch.nn.Module:
    model = build_model(tiny_config(name, **spread(name)), attention=attention)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    Materializer(model, device=CPU, seed=3)(model)
    model.set_experts_implementation("eager")  # the grouped kernel has no float64
    return model.double().train()


def spread(name: str) -> dict[str, float]:
    # at the default 0.02 a tiny model's attention is so flat that contamination would drown in rounding
    return {"initializer_range": 0.3}


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 128, (1, length), generator=generator) for length in (*LENGTHS, TAIL)]


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def weigh(logits: torch.Tensor, start: int) -> torch.Tensor:
    """A loss that differs for every position and token; the tail is unsupervised."""
    generator = torch.Generator().manual_seed(start)
    return (logits * torch.randn(logits.shape, generator=generator, dtype=logits.dtype)).sum()


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_packed_equals_unpacked(name, attention):
    model = double_model(name, attention)
    rows = documents()
    row = torch.cat(rows, dim=1)
    positions = torch.cat([torch.arange(document.shape[1]) for document in rows])[None]
    packed = model(input_ids=row, position_ids=positions, attention_mask=None, use_cache=False).logits
    alone = [model(input_ids=document, use_cache=False).logits for document in rows]
    pieces = packed.split([document.shape[1] for document in rows], dim=1)
    for one, other in zip(pieces, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    learned = range(len(LENGTHS))
    ours = gradients(model, sum(weigh(pieces[i], i) for i in learned))
    theirs = gradients(model, sum(weigh(alone[i], i) for i in learned))
    assert ours.keys() == theirs.keys()
    for key in ours:
        scale = theirs[key].abs().max() + 1e-12
        assert (ours[key] - theirs[key]).abs().max() / scale < 1e-5, key


def test_rows_of_micro_batches_are_as_their_positions_say():
    """Which is examined before they are moved; positions that replace those of a micro-batch count as they are."""
    model = double_model("mistral", "sdpa")
    row = torch.cat(documents(), dim=1)
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents()])[None]
    plain = torch.arange(row.shape[1])[None]
    one, several = (MicroBatch.of({"input_ids": row, "position_ids": each}).to("cpu") for each in (plain, positions))
    packed, whole = (model(input_ids=row, position_ids=each, use_cache=False).logits for each in (positions, plain))
    assert (packed - whole).abs().max() > 1e-2
    for micro, replaced, expected in (
        (one, {}, whole), (several, {}, packed),
        (one, {"position_ids": positions.clone()}, packed), (several, {"position_ids": plain.clone()}, whole),
    ):  # fmt: skip
        found = model(**{**micro.inputs, **replaced}, use_cache=False).logits
        assert torch.equal(found, expected)
        changed = replace(micro, inputs={**micro.inputs, **replaced})
        assert torch.equal(model(**changed.inputs, use_cache=False).logits, expected)
    plain[0, 7:] = positions[0, 7:]  # of the same tensor, moved once more
    boundaries, longest = find_boundaries(MicroBatch.of({"position_ids": plain}).to("cpu").inputs["position_ids"])
    assert (boundaries.tolist(), longest) == ([0, 7, 19, 24, 28], 12)


class Reached(Exception):
    """What the first attention was called with."""


def stop(module, args, kwargs):
    raise Reached(kwargs)


@pytest.mark.parametrize("moved", [True, False])
def test_attention_without_a_mask_is_given_the_boundaries_of_packed_rows(moved):
    model = build_model(tiny_config("llama"), attention="varlen")
    Materializer(model, device=CPU, seed=3)(model)
    model.model.layers[0].self_attn.register_forward_pre_hook(stop, with_kwargs=True)
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents()])[None]
    inputs = {"input_ids": torch.cat(documents(), dim=1), "position_ids": positions}
    with pytest.raises(Reached) as caught:
        model(**MicroBatch.of(inputs).to("cpu").inputs if moved else inputs, use_cache=False)
    (given,) = caught.value.args
    assert given["cu_seq_lens_q"].tolist() == given["cu_seq_lens_k"].tolist() == [0, 7, 19, 24, 28]
    assert given["max_length_q"] == given["max_length_k"] == 12


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_comparison_sees_contamination(name):
    model = double_model(name, "sdpa")
    rows = documents()
    row = torch.cat(rows, dim=1)
    mixed = model(input_ids=row, use_cache=False).logits.split([d.shape[1] for d in rows], dim=1)[1]
    assert (mixed - model(input_ids=rows[1], use_cache=False).logits).abs().max() > 1e-2
