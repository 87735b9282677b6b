"""Steps in which ranks lack images, videos or audio, and the truth: transformers' forward of each document alone.

A case is one step of a family on a layout; the truth is in float64.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FullyShardedDataParallel

from tests.models.layouts import materialized
from tests.models.multimodal import Sampler, alone, family_config, family_model, worst
from tests.pairwise import Matrix, Rule
from tests.parity.layouts import beside
from veomni.data.multimodal.collate import MultimodalCollator
from veomni.launcher import Launcher
from veomni.models import build_model, export_hf, freeze
from veomni.models.transformers_api.experts import has_experts
from veomni.parallel.wrappers import plain_name
from veomni.strategies import DDP, FSDP1, FSDP2, ContextParallel, ExpertParallel, Ulysses
from veomni.strategies.transforms.float64 import Float64Throughout
from veomni.testing.step import full_gradients

ROW = 48
TEXT = [("text", 9)]
IMAGE = [("text", 2), ("image", (1, 4, 8)), ("text", 4)]
TWO_IMAGES = [("image", (1, 4, 4)), ("text", 5), ("image", (1, 8, 4))]
VIDEO = [("text", 3), ("video", (2, 4, 4)), ("text", 2)]
AUDIO = [("text", 1), ("audio", 33), ("text", 4)]
HEAVY = [("image", (1, 8, 8)), ("text", 3), ("image", (1, 8, 8)), ("image", (1, 4, 4)), ("text", 2)]
Rows = list[list[list[tuple]]]

STEPS: dict[str, list[Rows]] = {
    "one rank reads text only": [[[IMAGE, TEXT], [VIDEO]], [[TEXT, TEXT], [TEXT]]],
    "images here, videos there": [[[IMAGE, TEXT], [TWO_IMAGES]], [[VIDEO, TEXT], [TEXT, VIDEO]]],
    "no rank has any": [[[TEXT, TEXT], [TEXT]], [[TEXT, TEXT], [TEXT]]],
    "audio here, images there": [[[AUDIO, TEXT], [TEXT]], [[IMAGE, TEXT], [TEXT, VIDEO]]],
    "audio here, text there": [[[AUDIO, TEXT], [AUDIO]], [[TEXT], [TEXT]]],
    "images here, text there": [[[IMAGE, TEXT], [TWO_IMAGES]], [[TEXT, TEXT], [TEXT]]],
    "one rank has all": [[[HEAVY], [HEAVY]], [[TEXT], [TEXT]]],
}
"""For each of two data ranks, the rows of its two micro-batches: here one row each, of one or more documents."""

LAYOUTS = {
    "ddp": (2, lambda: [DDP()]),
    "fsdp1": (2, lambda: [FSDP1()]),
    "fsdp2": (2, lambda: [FSDP2()]),
    "experts": (2, lambda: [FSDP2(), ExpertParallel(2)]),
    "hsdp": (4, lambda: [FSDP2(replicate=2), Ulysses(2)]),
    "ulysses": (4, lambda: [FSDP2(), Ulysses(2)]),
    "ulysses ddp": (4, lambda: [DDP(), Ulysses(2)]),
    "ulysses fsdp1": (4, lambda: [FSDP1(), Ulysses(2)]),
    "ring": (4, lambda: [FSDP1(), ContextParallel(2)]),
}
FROZEN = {
    "nothing": (),
    "encoder": ("model.visual",),
    "language model": ("model.language_model", "lm_head"),
    "projector": ("model.visual.merger", "model.visual.deepstack_merger_list"),
    "all but the projector": ("model.vision_tower", "model.language_model", "lm_head"),
}


@dataclass(frozen=True)
class Case:
    """One step."""

    layout: str
    step: str
    family: str = "qwen3_vl"
    frozen: str = "nothing"
    recompute: str = "none"
    balance: bool = False
    weighted: bool = False

    @property
    def ranks(self) -> int:
        return LAYOUTS[self.layout][0]

    def __str__(self) -> str:
        flags = [*["balance"] * self.balance, *["weighted"] * self.weighted]
        return ", ".join([self.family, self.layout, self.step, f"frozen {self.frozen}", self.recompute, *flags])

    def run(self) -> tuple[float, dict[str, torch.Tensor], int]:
        """Return the loss, every gradient and the patches that this rank has encoded."""
        strategies = beside(LAYOUTS[self.layout][1](), recompute=self.recompute, balance=self.balance)
        launcher = Launcher(strategies, accelerator="cpu", backend="gloo", precision="fp64", timeout_seconds=60)
        launcher.launch()
        model = build_model(weights_of(self.family))
        freeze(model, FROZEN[self.frozen])
        model = launcher.setup_model(model).train()
        encoded: list[int] = []
        for module in model.modules():
            if type(module).__name__.endswith("PatchEmbed"):
                module.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))
        collate = MultimodalCollator(family_config(self.family), max_seq_len=ROW, shard=launcher.sequence_shard)
        documents = documents_of(self.family, STEPS[self.step], self.weighted)
        micro_batches = [collate([row]) for row in documents[launcher.data_parallel.rank]]
        for batch in launcher.track([micro_batches]):
            for micro in launcher.accumulate(model, batch):
                launcher.backward(model(**micro.inputs).loss, micro)
            found = launcher.global_loss(batch).item(), whole_gradients(model), sum(encoded)
        launcher.close()
        return found


def documents_of(family: str, step: list[Rows], weighted: bool = False):
    sampler = Sampler(family)
    found = [[[sampler(parts) for parts in row] for row in rank] for rank in step]
    if weighted:  # tokens of the first rank only
        draw = torch.Generator().manual_seed(1)
        for sample in (sample for row in found[0] for sample in row):
            sample["loss_weights"] = 3 * torch.rand(sample["labels"].shape, generator=draw)
    return found


def step_of(family: str) -> str:
    if "omni" in family:
        return "audio here, images there"
    if family == "qwen2_audio":
        return "audio here, text there"
    return "images here, text there" if family in ("internvl", "llava", "gemma3") else "images here, videos there"


BALANCED = ("ddp", "fsdp1", "fsdp2", "ulysses")
MATRIX = Matrix(
    {
        "layout": [name for name in LAYOUTS if name != "experts"],
        "step": ["one rank reads text only", "images here, videos there", "no rank has any", "one rank has all"],
        "frozen": ["nothing", "encoder", "language model", "projector"], "recompute": ["none", "full"],
        "balance": [False, True], "weighted": [False, True],
    },
    [
        Rule(("layout", "balance"), lambda layout, balance: not balance or layout in BALANCED),
        # Where only an encoder is trained and no document needs one, there is nothing to compare.
        Rule(("step", "frozen"), lambda step, frozen: frozen != "language model" or step != "no rank has any"),
    ],
)  # fmt: skip


@functools.cache
def weights_of(family: str) -> Path:
    """A directory with weights that are spread; float32, as a checkpoint has them."""
    return export_hf(family_model(family).float(), Path(tempfile.mkdtemp()) / family)


def weights_of_targets(sample):
    weights = sample.get("loss_weights", torch.ones(sample["labels"].shape)).double()
    return torch.where(sample["labels"] == -100, 0.0, weights)[1:]


@functools.cache
def truth(family: str, step: str, frozen: str, weighted: bool):
    return true_step(family, documents_of(family, STEPS[step], weighted), FROZEN[frozen])


def true_step(family: str, documents, frozen: tuple[str, ...] = ()):
    """Return the loss and every parameter's gradient."""
    model = materialized(weights_of(family), attention="eager")
    freeze(model, frozen)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    if has_experts(model):
        model.set_experts_implementation("eager")
    samples = [sample for rank in documents for row in rank for sample in row]
    total = sum(float(weights_of_targets(sample).sum()) for sample in samples)
    loss = 0.0
    for sample in samples:
        inputs = {key: value for key, value in alone(sample).items() if key not in ("labels", "loss_weights")}
        with Float64Throughout():
            logits = model.train()(**inputs).logits[0]
        each = F.cross_entropy(logits[:-1], sample["labels"][1:], reduction="none")
        part = (each * weights_of_targets(sample)).sum() / total
        if part.requires_grad:  # nothing is trained on a text alone where only an encoder is trained
            part.backward()
        loss += part.item()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


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


def check(case: Case, found) -> None:
    loss, expected = truth(case.family, case.step, case.frozen, case.weighted)
    for found_loss, gradients, _ in found:
        assert found_loss == pytest.approx(loss, rel=1e-12)
        absent = gradients.keys() - expected.keys()  # a modality that no document has: zeros on all ranks
        assert all(not gradients[key].any() for key in absent)
        assert worst({key: gradients[key] for key in expected}, expected) <= 1e-12
