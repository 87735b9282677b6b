"""FLOPs of encoders against PyTorch's own counter over transformers' forward and backward of tiny models."""

from __future__ import annotations

import functools

import pytest
from torch.utils.flop_counter import FlopCounterMode

from tests.models.multimodal import AUDIO_SPAN, FAMILIES, IMAGES, SOUNDS, VIDEOS, Sampler, alone, family_model
from veomni.families.encoders import unread_parameters
from veomni.metrics import FlopsCounter
from veomni.models.adapter.passes.media import media_owner

ENCODERS = ("visual", "vision_tower", "audio_tower")
FROZEN = {
    "nothing": (),
    "encoders": tuple(f"model.{name}." for name in ENCODERS),
    "language model": ("model.language_model.", "lm_head."),
    "all but the projector": (*(f"model.{name}." for name in ENCODERS), "model.language_model.", "lm_head."),
}

# PyTorch also counts the padding of a clip's last chunk, where an encoder cuts clips into chunks, and here in one place
# less: the gradient of what a frozen encoder gives a projector that begins with a matrix.
BOUNDS = {
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), 0.003),
    "llava": 0.006,
    "qwen2_audio": 0.006,
}


def parts_of(name):
    """Media of several sizes, and text; audio fills the span of an encoder that pads to it, as padding is no work."""
    parts = [("text", 9)]
    if name in IMAGES:
        parts += [("image", (1, 8, 4)), ("image", (1, 4, 12))]
    if name in VIDEOS and name != "glm4v":  # whose images and videos have one placeholder
        parts += [("video", (3, 4, 4))]
    if name in SOUNDS:
        parts += [("audio", 2 * AUDIO_SPAN)] if name == "qwen2_audio" else [("audio", 47), ("audio", 40)]
    return [*parts, ("text", 4)]


model_of = functools.cache(family_model)


def measured(model, batch):
    """What PyTorch counts; without rotary angles, which have no weight, and layers whose output is not read."""
    with FlopCounterMode(display=False) as counter:
        loss = model(**batch).loss
        if any(parameter.requires_grad for parameter in model.parameters()):
            loss.backward()
    unread = {id(parameter) for parameter in unread_parameters(media_owner(model))}
    modules = {
        f"{type(model).__name__}.{name}" for name, module in model.named_modules()
        if (own := [id(each) for each in module.parameters()]) and unread.issuperset(own)
    }  # fmt: skip
    counts = counter.get_flop_counts()
    outer = {name for name in modules if name.rpartition(".")[0] not in modules}
    dropped = [each for name, each in counts.items() if name.endswith("rotary_emb") or name in outer]
    return counter.get_total_flops() - sum(sum(each.values()) for each in dropped)


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("name", FAMILIES)
def test_forward_and_backward_are_what_pytorch_counts(name, frozen):
    model, batch = model_of(name), alone(Sampler(name)(parts_of(name)))
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(not key.startswith(FROZEN[frozen]))
    for parameter in unread_parameters(media_owner(model)):
        parameter.requires_grad_(False)
    counter = FlopsCounter.from_model(model)
    found = counter.step_flops([batch["input_ids"].shape[1]], [batch]).full
    truth = measured(model, batch)
    assert found == pytest.approx(truth, rel=BOUNDS.get(name, 0))
