"""Documents with media, packed into a row, train exactly as alone: logits and every gradient, for every family.

The truth is transformers' own forward of each document alone, with position ids that the model computes.
"""

from __future__ import annotations

import pytest
import torch

from tests.models.multimodal import (
    FAMILIES,
    MROPE,
    Sampler,
    alone,
    documents_of,
    family_config,
    family_model,
    gradients,
    worst,
)
from veomni.data.multimodal.collate import MultimodalCollator
from veomni.errors import DataError
from veomni.models.adapter.passes.media import prepare_towers
from veomni.strategies.transforms.float64 import Float64Throughout

TAIL = 5


def samples_of(name):
    sampler = Sampler(name)
    return [sampler(parts) for parts in documents_of(name)]


def weigh(logits, number):
    """A loss that differs for every position and token."""
    generator = torch.Generator().manual_seed(number)
    return (logits * torch.randn(logits.shape, generator=generator, dtype=logits.dtype)).sum()


def separately(model, samples):
    outputs = []
    for number, sample in enumerate(samples):
        inputs = {key: value for key, value in alone(sample).items() if key != "labels"}
        with Float64Throughout():
            logits = model(**inputs).logits[0]
            weigh(logits, number).backward()
        outputs.append(logits.detach())
    return outputs, gradients(model)


def packed(model, name, samples, order):
    lengths = [len(samples[number]["input_ids"]) for number in order]
    collate = MultimodalCollator(family_config(name), max_seq_len=sum(lengths) + TAIL)
    batch = collate([[samples[number] for number in order]])
    assert batch.rows.document_lengths == tuple(lengths)
    inputs = {key: value for key, value in batch.inputs.items() if key != "labels"}
    with Float64Throughout():
        pieces = model(**inputs).logits[0].split([*lengths, TAIL])[:-1]
        sum(weigh(piece, number) for piece, number in zip(pieces, order, strict=True)).backward()
    return {number: piece.detach() for number, piece in zip(order, pieces, strict=True)}, gradients(model)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_equals_unpacked(name, attention):
    model = family_model(name, attention)
    samples = samples_of(name)
    outputs, expected = separately(model, samples)
    prepare_towers(model)
    numbers = list(range(len(samples)))
    for order in (numbers, numbers[::-1]):
        found, ours = packed(model, name, samples, order)
        for number, logits in found.items():
            assert (logits - outputs[number]).abs().max() <= 1e-12 * outputs[number].abs().max()
        assert worst(ours, expected) <= 1e-12


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_omni_moe_thinker", "gemma3"])
def test_the_comparison_sees_contamination(name):
    """Without what keeps documents apart (the text row, the restart of positions) the same row comes out otherwise."""
    model = family_model(name, "sdpa")
    samples = samples_of(name)
    outputs, _ = separately(model, samples)
    lengths = [len(sample["input_ids"]) for sample in samples]
    batch = MultimodalCollator(family_config(name), max_seq_len=sum(lengths))([samples])
    positions = batch["position_ids"].clone()
    rows = positions[0] if positions.dim() == 3 else positions
    rows[:] = torch.arange(rows.shape[1])
    inputs = {key: batch[key] for key in batch.inputs if not key.startswith(("cu_", "max_", "labels"))}
    with Float64Throughout():
        mixed = model(**{**inputs, "position_ids": positions}).logits[0].split(lengths)
    assert (mixed[1] - outputs[1]).abs().max() > 1e-3 * outputs[1].abs().max()


@pytest.mark.parametrize("name", MROPE)
def test_a_row_has_four_axes_text_first(name):
    samples = samples_of(name)
    lengths = [len(sample["input_ids"]) for sample in samples]
    batch = MultimodalCollator(family_config(name), max_seq_len=sum(lengths) + TAIL)([samples, samples[:1]])
    assert batch["position_ids"].shape == (4, 2, sum(lengths) + TAIL)
    expected = torch.cat([torch.arange(length) for length in [*lengths, TAIL]])
    assert torch.equal(batch["position_ids"][0, 0], expected)
    assert batch["labels"].shape == batch["input_ids"].shape == (2, sum(lengths) + TAIL)
    starts = (batch["position_ids"][0] == 0).nonzero(as_tuple=True)
    assert set(batch["labels"][starts].tolist()) == {-100}


def test_images_and_videos_of_one_token_need_their_types():
    """GLM-4V writes videos with the token of images: transformers takes no row that has both."""
    model, samples = family_model("glm4v"), samples_of("glm4v")
    prepare_towers(model)
    batch = MultimodalCollator(family_config("glm4v"), max_seq_len=120)([samples])
    del batch.inputs["mm_token_type_ids"]
    with pytest.raises(DataError, match="mm_token_type_ids"):
        model(**batch.inputs)


BAD = {
    "no tokens": ({"pixel_values": torch.zeros(4, 96)}, "input_ids"),
    "unknown key": ({"input_ids": torch.arange(4), "imge_grid_thw": torch.ones(1, 3)}, "did you mean 'image_grid_thw'"),
    "too long": ({"input_ids": torch.arange(40)}, "40 tokens"),
    "image without size": ({"input_ids": torch.tensor([5, 120, 120, 7])}, "placeholders"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_documents_are_rejected(case):
    sample, message = BAD[case]
    with pytest.raises(DataError, match=message):
        MultimodalCollator(family_config("qwen2_5_vl"), max_seq_len=32)([[sample]])
