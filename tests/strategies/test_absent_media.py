"""Batches in which ranks lack images, videos or sounds: no rank waits, and every gradient is that of one process.

The truth is transformers' own forward of each document by itself, in float64.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FullyShardedDataParallel

from tests.models.layouts import materialized
from tests.models.multimodal import FAMILIES, Sampler, alone, family_config, family_model, worst
from tests.parity.layouts import beside
from veomni.data.multimodal.collate import MultimodalCollator
from veomni.launcher import Launcher
from veomni.models import build_model, export_hf, freeze
from veomni.parallel.wrappers import plain_name
from veomni.strategies import DDP, FSDP1, FSDP2, ContextParallel, ExpertParallel, Single, Ulysses
from veomni.strategies.transforms.compute_dtype import Float64Throughout
from veomni.testing.ranks import RankFailed, run_ranks
from veomni.testing.step import full_gradients

ROW = 48
TEXT = [("text", 9)]
IMAGE = [("text", 2), ("image", (1, 4, 8)), ("text", 4)]
TWO_IMAGES = [("image", (1, 4, 4)), ("text", 5), ("image", (1, 8, 4))]
VIDEO = [("text", 3), ("video", (2, 4, 4)), ("text", 2)]
SOUND = [("text", 1), ("audio", 33), ("text", 4)]
Rows = list[list[list[tuple]]]

STEPS: dict[str, list[Rows]] = {
    "one rank reads text only": [[[IMAGE, TEXT], [VIDEO]], [[TEXT, TEXT], [TEXT]]],
    "images here, videos there": [[[IMAGE, TEXT], [TWO_IMAGES]], [[VIDEO, TEXT], [TEXT, VIDEO]]],
    "no rank has any": [[[TEXT, TEXT], [TEXT]], [[TEXT, TEXT], [TEXT]]],
    "sounds here, images there": [[[SOUND, TEXT], [TEXT]], [[IMAGE, TEXT], [TEXT, VIDEO]]],
    "sounds here, text there": [[[SOUND, TEXT], [SOUND]], [[TEXT], [TEXT]]],
    "images here, text there": [[[IMAGE, TEXT], [TWO_IMAGES]], [[TEXT, TEXT], [TEXT]]],
}
"""For each of two data ranks, the rows of its two micro-batches: here one row each, of one or more documents."""

LAYOUTS = {
    "ddp2": (2, DDP),
    "fsdp1": (2, FSDP1),
    "fsdp2": (2, FSDP2),
    "hsdp": (4, lambda: [FSDP2(replicate=2), Ulysses(2)]),
    "ulysses": (4, lambda: [FSDP2(), Ulysses(2)]),
    "ulysses ddp": (4, lambda: [DDP(), Ulysses(2)]),
    "ulysses fsdp1": (4, lambda: [FSDP1(), Ulysses(2)]),
    "experts": (2, lambda: [FSDP2(), ExpertParallel(2)]),
    "ring": (4, lambda: [FSDP1(), ContextParallel(2)]),
}


@functools.cache
def weights_of(name: str) -> Path:
    """A directory with weights that are spread; float32, as a checkpoint has them."""
    return export_hf(family_model(name).float(), Path(tempfile.mkdtemp()) / name)


def documents(name: str, step: list[Rows], weighed: bool = False):
    sampler = Sampler(name)
    found = [[[sampler(parts) for parts in row] for row in rank] for rank in step]
    if weighed:  # tokens of the first rank only
        draw = torch.Generator().manual_seed(1)
        for sample in (sample for row in found[0] for sample in row):
            sample["loss_weights"] = 3 * torch.rand(sample["labels"].shape, generator=draw)
    return found


def weights_of_targets(sample):
    weights = sample.get("loss_weights", torch.ones(sample["labels"].shape)).double()
    return torch.where(sample["labels"] == -100, 0.0, weights)[1:]


def truth(name: str, step: list[Rows], frozen: tuple[str, ...], weighed: bool = False):
    model = materialized(weights_of(name), attention="eager")
    freeze(model, frozen)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    samples = [sample for rank in documents(name, step, weighed) for row in rank for sample in row]
    total = sum(float(weights_of_targets(sample).sum()) for sample in samples)
    loss = 0.0
    for sample in samples:
        inputs = {key: value for key, value in alone(sample).items() if key not in ("labels", "loss_weights")}
        with Float64Throughout():
            logits = model.train()(**inputs).logits[0]
        each = F.cross_entropy(logits[:-1], sample["labels"][1:], reduction="none")
        part = (each * weights_of_targets(sample)).sum() / total
        if part.requires_grad:  # nothing is trained on a text alone where only a tower is trained
            part.backward()
        loss += part.item()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def one_step(name, layout, step, frozen=(), recompute="none", weighed=False):
    strategies = LAYOUTS[layout][1]() if layout in LAYOUTS else Single()
    strategies = beside(strategies, recompute=recompute)
    launcher = Launcher(strategies, accelerator="cpu", backend="gloo", precision="fp64", timeout_seconds=60)
    launcher.launch()
    model = build_model(weights_of(name))
    freeze(model, frozen)
    model = launcher.setup_model(model).train()
    rank = launcher.data_parallel.rank
    collate = MultimodalCollator(family_config(name), max_seq_len=ROW, shard=launcher.sequence_shard)
    micro_batches = [collate([row]) for row in documents(name, step, weighed)[rank]]
    for batch in launcher.track([micro_batches]):
        for micro in launcher.accumulate(model, batch):
            launcher.backward(model(**micro.inputs).loss, micro)
        found = launcher.global_loss(batch).item(), whole_gradients(model)
    launcher.close()
    return found


def whole_gradients(model):
    if not isinstance(model, FullyShardedDataParallel):
        return full_gradients(model)
    # PyTorch does not gather the gradients of units of which a part is frozen: they travel as parameters do.
    trained = {plain_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        named = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        return {name: named[name].detach().clone() for name in trained}


def check(name, layout, step, frozen=(), recompute="none", weighed=False):
    loss, expected = truth(name, STEPS[step], frozen, weighed)
    weights_of(name)
    ranks, options = LAYOUTS[layout][0], (frozen, recompute, weighed)
    for found_loss, found in run_ranks(one_step, ranks, name, layout, STEPS[step], *options, init=False):
        assert found_loss == pytest.approx(loss, rel=1e-12)
        absent = found.keys() - expected.keys()  # a modality that no document has: zeros, and not None on some ranks
        assert all(not found[key].any() for key in absent)
        assert worst({key: found[key] for key in expected}, expected) <= 1e-12


def step_of(name):
    if "omni" in name:
        return "sounds here, images there"
    if name == "qwen2_audio":
        return "sounds here, text there"
    return "images here, text there" if name in ("internvl", "llava", "gemma3") else "images here, videos there"


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "experts"])
@pytest.mark.parametrize("step", ["one rank reads text only", "no rank has any"])
def test_every_layout(layout, step):
    check("qwen3_vl", layout, step)


@pytest.mark.parametrize("layout", ["fsdp2", "ulysses"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, layout):
    check(name, layout, step_of(name))


@pytest.mark.parametrize("layout", ["ddp2", "ulysses", "ring"])
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_omni_moe_thinker"])
def test_weights_of_tokens(name, layout):
    check(name, layout, step_of(name), weighed=True)


@pytest.mark.parametrize("name", ["qwen2_5_omni_thinker", "llava", "gemma3", "qwen2_audio"])
def test_replicas_wait_for_no_parameter(name):
    """Replicated training waits for a gradient of every parameter: those that nothing reads are frozen."""
    check(name, "ddp2", step_of(name))


@pytest.mark.parametrize("name", ["qwen3_omni_moe_thinker", "glm4v"])
def test_flat_shards_and_a_ring(name):
    check(name, "ring", step_of(name))


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "qwen3_omni_moe_thinker"])
def test_experts_on_other_ranks(name):
    check(name, "experts", step_of(name))


def test_a_mask_that_a_ring_cannot_split_is_refused():
    """Gemma 3 lets the tokens of an image see each other, by a mask that it makes itself."""
    with pytest.raises(RankFailed, match="adds a rule of its own to its mask"):
        check("gemma3", "ring", step_of("gemma3"))


FROZEN = {
    "tower": ("qwen3_vl", ("model.visual",)),
    "language model": ("qwen3_vl", ("model.language_model", "lm_head")),
    "projector": ("qwen3_vl", ("model.visual.merger", "model.visual.deepstack_merger_list")),
    "all but the projector": ("llava", ("model.vision_tower", "model.language_model", "lm_head")),
}


@pytest.mark.parametrize("layout", ["fsdp1", "fsdp2", "ulysses ddp"])
@pytest.mark.parametrize("part", FROZEN)
def test_frozen_parts(part, layout):
    name, frozen = FROZEN[part]
    check(name, layout, "images here, text there", frozen)


@pytest.mark.parametrize("layout", ["fsdp1", "fsdp2", "ulysses"])
def test_recomputation(layout):
    check("qwen3_vl", layout, "images here, videos there", recompute="full")
