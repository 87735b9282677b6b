"""Composed models: exact on every layout with each loss's own token count, saved and read again part by part."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.models.layouts import materialized, same_files
from tests.models.multimodal import gradients, worst
from tests.parity.layouts import beside
from tests.strategies.media import whole_gradients
from veomni.data.multimodal.collate import MultimodalCollator
from veomni.errors import ConfigError, DataError, ModelError
from veomni.launcher import Launcher
from veomni.models import (
    Materializer,
    build_config,
    build_model,
    build_omni_model,
    derive_plan,
    export_hf,
)
from veomni.models.adapter.passes.media import prepare_towers
from veomni.strategies import DDP, FSDP1, FSDP2, Ulysses
from veomni.strategies.transforms.float64 import Float64Throughout
from veomni.testing.ranks import run_ranks

TINY = Path(__file__).parent / "tiny_omni.json"
IMAGE, SOUND, CODE, LATENT, ROW = 120, 121, 122, 123, 48
PARTS = ["foundation", "image_encoder", "image_projector", "audio_encoder", "audio_projector", "decoders.codes",
         "decoders.latents"]  # fmt: skip


def document(generator: torch.Generator, *parts: str) -> dict[str, torch.Tensor]:
    """Text between media: "image" and "sound" go in, "codes" and "latents" are also generated."""
    pieces: list[torch.Tensor] = []
    media: dict[str, list[torch.Tensor]] = {}
    for part in parts:
        pieces.append(torch.randint(3, 110, (4,), generator=generator))
        if part == "image":
            media.setdefault("pixel_values", []).append(torch.randn(1, 3, 8, 8, generator=generator).double())
            pieces.append(torch.full((4,), IMAGE))
        if part == "sound":
            media.setdefault("input_features", []).append(torch.randn(1, 8, 40, generator=generator).double())
            media.setdefault("feature_attention_mask", []).append((torch.arange(40) < 20).long()[None])
            pieces.append(torch.full((5,), SOUND))
        if part in ("codes", "latents"):
            pieces.append(torch.full((6,), CODE if part == "codes" else LATENT))
    ids = torch.cat([*pieces, torch.randint(3, 110, (2,), generator=generator)])
    sample = {"input_ids": ids, "labels": torch.where(ids >= IMAGE, -100, ids)}
    if parts[0] in ("image", "sound"):  # the loss of text alone has weights, those of decoders have none
        sample["loss_weights"] = 3 * torch.rand(ids.shape, generator=torch.Generator().manual_seed(len(ids)))
    if "codes" in parts:
        codes = torch.randint(0, 32, ids.shape, generator=generator)
        sample["codes"] = torch.where(ids == CODE, codes, -100)
    if "latents" in parts:
        there = ids == LATENT
        sample["latents"] = torch.randn(len(ids), 4, generator=generator).double() * there[:, None]
        sample["latents_time"] = torch.where(there, 0.0, -1.0).double()
    return sample | {key: torch.cat(values) for key, values in media.items()}


STEP = [
    [[("image", "codes"), ("text",)], [("text", "codes")]],
    [[("sound", "latents"), ("text",)], [("text",)]],
]
"""For each of two data ranks, the documents of its two micro-batches."""


def documents(step=STEP):
    generator = torch.Generator().manual_seed(5)
    return [[[document(generator, *parts) for parts in row] for row in rank] for rank in step]


@functools.cache
def weights() -> Path:
    model = materialized(TINY)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn(parameter.shape, generator=generator)
    return export_hf(model, Path(tempfile.mkdtemp()) / "omni")


def double_model():
    model = materialized(weights(), attention="eager")
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    return model.train()


def text_weights(sample):
    weights = sample.get("loss_weights", torch.ones(len(sample["labels"]))).double()
    return torch.where(sample["labels"] == -100, 0.0, weights)[1:]


def truth():
    """One process, each document alone, each loss written out and averaged over its own tokens of the step."""
    model = double_model()
    samples = [sample for rank in documents() for row in rank for sample in row]
    collate = MultimodalCollator(build_config(TINY), max_seq_len=ROW)
    totals = {
        "text": sum(float(text_weights(sample).sum()) for sample in samples),
        "codes": sum(int((sample["codes"][1:] >= 0).sum()) for sample in samples if "codes" in sample),
        "latents": sum(int((s["latents_time"][1:] >= 0).sum()) for s in samples if "latents_time" in s),
    }
    sums = dict.fromkeys(totals, 0.0)
    for sample in samples:
        length = len(sample["input_ids"])
        batch = {key: value for key, value in collate([[sample]]).inputs.items() if not key.startswith(("cu_", "max_"))}
        tokens = {key: value[:, :length] for key, value in batch.items() if value.shape[:2] == (1, ROW)}
        with Float64Throughout():
            output = model(**{**batch, **tokens, "labels": None})
            each = F.cross_entropy(output.logits[0, :-1], sample["labels"][1:], reduction="none")
            parts = {"text": (each * text_weights(sample)).sum()}
            for name, key in (("codes", "codes_next"), ("latents", "latents_time")):
                if key in tokens:
                    parts[name] = output.losses[name] * int((tokens[key] >= 0).sum())
        sum(part / totals[name] for name, part in parts.items()).backward()
        for name, part in parts.items():
            sums[name] += part.item() / totals[name]
    return sums, gradients(model)


def one_step(strategies, balance):
    strategies = beside(strategies, balance=balance)
    launcher = Launcher(strategies, accelerator="cpu", backend="gloo", precision="fp64", timeout_seconds=60)
    launcher.launch()
    model = launcher.setup_model(build_model(weights())).train()
    collate = MultimodalCollator(build_config(TINY), max_seq_len=ROW, shard=launcher.sequence_shard)
    micro_batches = [collate([row]) for row in documents()[launcher.data_parallel.rank]]
    for batch in launcher.track([micro_batches]):
        for micro in launcher.accumulate(model, batch):
            launcher.backward(model(**micro.inputs).losses, micro)
        losses = {name: loss.item() for name, loss in launcher.global_losses(batch).items()}
        held_out = launcher.evaluate(model, [micro_batches], answers=True)
        found = losses, launcher.global_loss(batch).item(), whole_gradients(model)
    launcher.close()
    return *found, held_out


LAYOUTS = {
    "ddp": (2, [DDP()]),
    "fsdp1": (2, [FSDP1()]),
    "fsdp2": (2, [FSDP2()]),
    "ulysses": (4, [FSDP2(), Ulysses(2)]),
    "balanced": (2, [FSDP2()]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_loss_is_a_mean_over_its_own_tokens_of_all_ranks(layout):
    sums, expected = truth()
    ranks, strategies = LAYOUTS[layout]
    for losses, total, found, held_out in run_ranks(one_step, ranks, strategies, layout == "balanced", init=False):
        assert losses == pytest.approx({f"loss_{name}": value for name, value in sums.items()}, rel=1e-12)
        assert total == pytest.approx(sum(sums.values()), rel=1e-12)
        assert held_out["eval_loss"] == pytest.approx(sums["text"], rel=1e-12)
        assert {f"eval_loss_{name}" for name in sums} - held_out.keys() == {"eval_loss_text"}
        for name in ("codes", "latents"):
            assert held_out[f"eval_loss_{name}"] == pytest.approx(sums[name], rel=1e-12)
        assert worst({key: found[key] for key in expected}, expected) <= 1e-12
        assert all(not found[key].any() for key in found.keys() - expected.keys())


def test_packed_equals_unpacked():
    model = double_model()
    prepare_towers(model)
    samples = [sample for rank in documents() for row in rank for sample in row]
    lengths = [len(sample["input_ids"]) for sample in samples]
    config = build_config(TINY)
    batch = MultimodalCollator(config, max_seq_len=sum(lengths))([samples])
    with Float64Throughout():
        whole = model(**batch.inputs)
        alone = [
            model(**MultimodalCollator(config, max_seq_len=n)([[s]]).inputs)
            for n, s in zip(lengths, samples, strict=True)
        ]
    for piece, one in zip(whole.logits[0].split(lengths), alone, strict=True):
        torch.testing.assert_close(piece, one.logits[0], rtol=1e-11, atol=1e-11)
    codes = [int((sample["codes"][1:] >= 0).sum()) if "codes" in sample else 0 for sample in samples]
    mean = sum(one.losses["codes"] * count for one, count in zip(alone, codes, strict=True)) / sum(codes)
    torch.testing.assert_close(whole.losses["codes"], mean, rtol=1e-11, atol=0)


def test_each_part_has_a_plan_of_its_own():
    model = build_model(TINY)
    assert model.component_names == PARTS
    blocks = derive_plan(model).blocks
    assert {"foundation.model.layers.1", "decoders.latents.layers.0"} <= set(blocks)
    assert sum(block.startswith("image_encoder") for block in blocks) == 2
    assert sum(block.startswith("audio_encoder") for block in blocks) == 2


def test_parts_are_exported_and_read_alone_and_together(tmp_path):
    from transformers import AutoModel, AutoModelForCausalLM

    model = materialized(weights())
    exported = export_hf(model, tmp_path / "out")
    assert json.loads((exported / "config.json").read_text())["model_type"] == "omni"
    for part in PARTS:
        assert (exported.joinpath(*part.split(".")) / "model.safetensors").is_file()
    alone = AutoModelForCausalLM.from_pretrained(exported / "foundation")
    assert torch.equal(alone.model.embed_tokens.weight, model.foundation.model.embed_tokens.weight)
    for part in ("image_encoder", "audio_encoder"):
        encoder, report = AutoModel.from_pretrained(exported / part, output_loading_info=True)
        assert not report["missing_keys"]
        for name, parameter in encoder.named_parameters():
            assert torch.equal(parameter, model.get_submodule(part).get_parameter(name)), name
    again = materialized(exported)
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def test_a_model_is_composed_from_parts_that_exist():
    """Foundation and encoder come with their weights; projectors and decoders start from random ones."""
    directory = weights()
    composed = build_omni_model(
        directory / "foundation", image_encoder=directory / "image_encoder", image_token_id=IMAGE,
        decoders={"codes": {"codebook_size": 16, "channels": 4}},
    )  # fmt: skip
    Materializer(composed, device=torch.device("cpu"), seed=0)(composed)
    model = materialized(directory)
    assert composed.component_names == ["foundation", "image_encoder", "image_projector", "decoders.codes"]
    for name, parameter in composed.named_parameters():
        if name.startswith(("foundation", "image_encoder")):
            assert torch.equal(parameter, model.get_parameter(name)), name
        else:
            assert parameter.isfinite().all()


def fsdp_export(path):
    launcher = Launcher(FSDP2(), accelerator="cpu", backend="gloo")
    launcher.launch()
    model = launcher.setup_model(build_model(weights()))
    launcher.export(model, path)
    launcher.close()


def test_a_sharded_model_exports_the_same_parts(tmp_path):
    run_ranks(fsdp_export, 2, tmp_path / "sharded", init=False)
    for part in PARTS:
        assert same_files(tmp_path.joinpath("sharded", *part.split(".")), weights().joinpath(*part.split(".")))


def test_what_cannot_be_composed_is_rejected():
    with pytest.raises(ModelError, match="image_token_id"):
        build_omni_model(weights() / "foundation", image_encoder=weights() / "image_encoder")
    with pytest.raises((ConfigError, ModelError), match="did you mean 'codes'"):
        build_omni_model(weights() / "foundation", decoders={"code": {"codebook_size": 4, "channels": 4}})
    sample = document(torch.Generator().manual_seed(0), "image")
    sample["pixel_values"] = sample["pixel_values"].repeat(2, 1, 1, 1)
    batch = MultimodalCollator(build_config(TINY), max_seq_len=ROW)([[sample]])
    with pytest.raises(DataError, match="4 placeholders"):
        double_model()(**batch.inputs)
