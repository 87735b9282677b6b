"""Building, positions, precomputed vision inputs and exports of every vision-language and omni family."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.layouts import materialized
from tests.models.multimodal import FAMILIES, IMAGES, MROPE, Sampler, alone, documents_of, family_config, family_model
from veomni.families.mrope import FRACTION_PARTS, FRACTIONS, DocumentPositions
from veomni.models import build_model, derive_plan, export_hf
from veomni.models.adapter.adapter import ModelAdapter
from veomni.models.adapter.passes.media import prepare_towers
from veomni.models.transformers_api.encoders import vision_inputs

VISION = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v")
MODALITIES = {
    **dict.fromkeys(VISION, ("image", "video")),
    **dict.fromkeys(("internvl", "llava", "gemma3"), ("image",)),
    "qwen2_audio": ("audio",),
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), ("audio", "image", "video")),
}


def owner_of_rule(model):
    return next(module for module in model.modules() if hasattr(module, "get_rope_index"))


@pytest.mark.parametrize("name", FAMILIES)
def test_towers_are_found(name):
    model = build_model(family_config(name))
    prepare_towers(model)
    towers = ModelAdapter.of(model).towers
    assert tuple(towers) == MODALITIES[name]
    prepare_towers(model)
    assert ModelAdapter.of(model).towers is towers  # nothing is wrapped twice


@pytest.mark.parametrize("name", FAMILIES)
def test_every_repeated_layer_is_a_unit_of_sharding(name):
    """Of towers too: what no block holds is gathered as a whole, and stays so until the backward."""
    model = build_model(family_config(name))
    blocks = derive_plan(model).blocks
    for path, module in model.named_modules():
        if path.endswith((".layers", ".layer", ".blocks")):
            for child in map(str, range(len(module))):
                assert any(f"{path}.{child}.".startswith(f"{block}.") for block in blocks), f"{path}.{child}"
    towers = [name for name in blocks if "language_model" not in name]
    assert len(towers) >= 2 * len({name.split(".")[1] for name in towers})


@pytest.mark.parametrize("name", MROPE)
def test_positions_are_those_of_the_whole_model(name):
    """The contract of the object without weights: transformers' own model, asked for each document, says the same."""
    config = family_config(name)
    owner = owner_of_rule(build_model(config))
    positions, sampler = DocumentPositions(config), Sampler(name)
    for parts in documents_of(name):
        sample = sampler(parts)
        batch = alone(sample)
        names = inspect.signature(owner.get_rope_index).parameters
        given = {key: batch[key] for key in names if key in batch}
        if "audio_seqlens" in names and "feature_attention_mask" in batch:
            given |= {"audio_seqlens": batch["feature_attention_mask"].sum(-1)}
        if "second_per_grids" in names:
            given |= {"second_per_grids": batch.get("video_second_per_grid")}
        axes, _ = owner.get_rope_index(**given)
        found = positions(sample)
        assert torch.equal(found["position_ids"][0], torch.arange(len(sample["input_ids"])))
        fractions = found.get(FRACTIONS, torch.zeros(1, 3)).T / FRACTION_PARTS
        assert torch.equal(found["position_ids"][1:] + fractions, axes[:, 0].float())
        assert (FRACTIONS in found) == (name == "qwen3_omni_moe_thinker" and "video" in dict(parts))


@pytest.mark.parametrize("name", [name for name in MROPE if name != "glm4v"])
def test_token_types_are_found_where_a_document_brings_none(name):
    positions, sampler = DocumentPositions(family_config(name)), Sampler(name)
    for parts in documents_of(name):
        sample = sampler(parts)
        without = {key: value for key, value in sample.items() if key != "mm_token_type_ids"}
        found, expected = positions(without), positions(sample)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("name", [name for name in IMAGES if name in MROPE])
def test_precomputed_vision_inputs_are_taken(name):
    """The features are the same with them, and others with other borders: so they are what the tower goes by."""
    config, model, sampler = family_config(name), family_model(name), Sampler(name)
    sample = alone(sampler([("text", 3), ("image", (1, 4, 8)), ("image", (1, 8, 4)), ("video", (2, 4, 4))]))
    made = vision_inputs(config, sample)
    assert {"image_cu_seqlens", "image_position_ids", "video_cu_seqlens", "video_position_ids"} <= set(made)
    for modality, values in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        encode = getattr(model, f"get_{modality}_features")
        own = {key: value for key, value in made.items() if key.startswith(modality)}
        expected = encode(sample[values], sample[f"{modality}_grid_thw"]).pooler_output
        found = encode(sample[values], sample[f"{modality}_grid_thw"], **own).pooler_output
        assert all(map(torch.equal, found, expected))
        one_border = {**own, f"{modality}_cu_seqlens": own[f"{modality}_cu_seqlens"][[0, -1]]}
        merged = encode(sample[values], sample[f"{modality}_grid_thw"], **one_border).pooler_output
        assert not torch.allclose(torch.cat(merged), torch.cat(expected))


@pytest.mark.parametrize("name", FAMILIES)
def test_export_is_read_by_transformers(name, tmp_path):
    """Names and shapes are the hub's: transformers reads the directory without a missing weight and computes alike."""
    import transformers

    model = family_model(name).float()
    exported = export_hf(model, tmp_path / "hf")
    cls = getattr(transformers, type(model).__name__)
    again, report = cls.from_pretrained(exported, output_loading_info=True, attn_implementation="eager")
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    back = build_model(exported, attention="eager")
    assert type(back) is type(model)
    sample = alone(Sampler(name)(documents_of(name)[1]))
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in sample.items()}
    model.config._experts_implementation = again.config._experts_implementation = "eager"
    with torch.no_grad():
        torch.testing.assert_close(again.train()(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_the_thinker_of_a_whole_omni_checkpoint_is_built(kind, tmp_path):
    """The hub's directories hold a talker too; its weights are left out, and the thinker's lose their prefix."""
    model = family_model(f"{kind}_thinker").float()
    export_hf(model, tmp_path / "thinker")
    tensors = load_file(tmp_path / "thinker" / "model.safetensors")
    whole = tmp_path / "whole"
    whole.mkdir()
    renamed = {f"thinker.{name}": value for name, value in tensors.items()}
    save_file({**renamed, "talker.proj.weight": torch.ones(2)}, whole / "model.safetensors")
    thinker = json.loads((tmp_path / "thinker" / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({"model_type": kind, "thinker_config": thinker}))
    again = materialized(whole)
    assert type(again) is type(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
