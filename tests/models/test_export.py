"""What is exported is what transformers reads, bit for bit, from every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.models.layouts import fsdp1, fsdp2, logits, materialized, same_files
from tests.models.tiny import OTHER_MODELS, TEXT_MODELS, tiny_config
from veomni import Launcher
from veomni.errors import ModelError
from veomni.models import build_model, export_hf, export_tensors
from veomni.testing.ranks import RankFailed, run_ranks


def loaded(directory: Path, like: torch.nn.Module) -> torch.nn.Module:
    implementation = like.config._attn_implementation
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation=implementation, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    model.config.use_cache = False
    return model


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_an_export_is_what_save_pretrained_writes_and_from_pretrained_reads(name, tmp_path):
    model = materialized(tiny_config(name))
    export_hf(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    assert same_files(tmp_path / "ours", tmp_path / "theirs")
    assert torch.equal(logits(loaded(tmp_path / "ours", model)), logits(model))


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_towers_and_encoders_are_exported_as_save_pretrained_does(name, tmp_path):
    model = materialized(tiny_config(name))
    export_hf(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    assert same_files(tmp_path / "ours", tmp_path / "theirs")
    _, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "nomic_bert"])
def test_names_and_layouts_stay_those_of_the_checkpoint_that_was_loaded(name, tmp_path):
    model = materialized(tiny_config(name))
    model.save_pretrained(tmp_path / "source")
    save_file(dict(model.state_dict()), tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    export_hf(materialized(tmp_path / "source"), tmp_path / "ours")
    type(model).from_pretrained(tmp_path / "source").save_pretrained(tmp_path / "theirs")
    assert same_files(tmp_path / "ours", tmp_path / "theirs")
    assert same_files(tmp_path / "ours", tmp_path / "source")


def test_more_than_ten_experts_keep_their_order(tmp_path):
    model = materialized(tiny_config("qwen3_moe", num_experts=12))
    export_hf(model, tmp_path / "a")
    assert torch.equal(logits(loaded(tmp_path / "a", model)), logits(model))
    assert torch.equal(logits(materialized(tmp_path / "a")), logits(model))


def test_a_tied_weight_is_written_once(tmp_path):
    model = materialized(tiny_config("qwen3"))
    tensors = list(model.state_dict().items())
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= dict(tensors).keys()
    export_tensors(model.config, tensors, tmp_path / "a", max_shard_size=1)
    files = sorted((tmp_path / "a").glob("model-*.safetensors"))
    assert len(files) == len(tensors) - 1
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == len(files)
    assert index["metadata"]["total_size"] == 4 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "mixtral", "gpt_oss"])
def test_an_exported_model_is_read_back_bit_for_bit(name, tmp_path):
    model = materialized(tiny_config(name), seed=7)
    export_hf(model, tmp_path / "a", max_shard_size=50_000)
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 1
    assert max(path.stat().st_size for path in (tmp_path / "a").glob("*.safetensors")) < 55_000
    assert torch.equal(logits(materialized(tmp_path / "a", seed=1)), logits(model))


def test_experts_are_exported_one_by_one(tmp_path):
    export_hf(materialized(tiny_config("qwen3_moe")), tmp_path / "a", max_shard_size=50_000)
    names = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in names
    assert not any("gate_up_proj" in name for name in names)


def test_bfloat16_export(tmp_path):
    model = materialized(tiny_config("glm4_moe"))
    export_hf(model, tmp_path / "a", dtype=torch.bfloat16)
    model.to(torch.bfloat16)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert again.dtype is torch.bfloat16
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    assert again.model.layers[1].mlp.gate.e_score_correction_bias.dtype is torch.float32


def _export_sharded(layout, config, directory, **options):
    model = layout(config, **options)
    export_hf(model, directory)


@pytest.mark.parametrize("layout", [fsdp2, fsdp1])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_sharded_models_export_like_a_single_process(layout, name, tmp_path):
    run_ranks(_export_sharded, 2, layout, tiny_config(name), tmp_path / "sharded")
    export_hf(materialized(tiny_config(name)), tmp_path / "single")
    assert same_files(tmp_path / "sharded", tmp_path / "single")


def test_an_export_that_fails_on_rank_zero_fails_on_every_rank(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RankFailed) as failure:
        run_ranks(_export_sharded, 2, fsdp2, tiny_config("llama"), tmp_path / "file")
    assert sorted(failure.value.exceptions) == [0, 1]


@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_export_from_loose_tensors(name, tmp_path):
    model = materialized(tiny_config(name))
    export_hf(model, tmp_path / "model")
    tensors = list(model.state_dict().items())[::-1]
    export_tensors(model.config, tensors, tmp_path / "tensors")
    assert same_files(tmp_path / "model", tmp_path / "tensors")


def test_loose_tensors_must_be_complete_and_fit(tmp_path):
    model = materialized(tiny_config("llama"))
    tensors = dict(model.state_dict())
    norm = tensors.pop("model.norm.weight")
    with pytest.raises(ModelError, match=r"missing for the export: model\.norm\.weight"):
        export_tensors(model.config, tensors.items(), tmp_path / "a")
    with pytest.raises(ModelError, match=r"model\.norm\.weight \[31\] does not fit"):
        export_tensors(model.config, [("model.norm.weight", norm[1:])], tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_export_is_replaced_and_other_directories_are_not(tmp_path):
    export_hf(materialized(tiny_config("llama")), tmp_path / "a", max_shard_size=20_000)
    second = materialized(tiny_config("llama"), seed=2)
    export_hf(second, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert not list((tmp_path / "a").glob("model-*"))
    assert torch.equal(logits(loaded(tmp_path / "a", second)), logits(second))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="something other than an export"):
        export_hf(second, tmp_path / "other")
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"


def test_configs_and_tokenizer_travel_along(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")))
    model = materialized(tiny_config("llama"))
    model.generation_config.max_new_tokens = 5
    export_hf(model, tmp_path / "a", tokenizer=tokenizer)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["architectures"], config["dtype"], config["use_cache"]) == (["LlamaForCausalLM"], "float32", True)
    assert not any("attn_implementation" in key for key in config)
    assert model.config.use_cache is False
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "a")("b").input_ids == [1]
    rebuilt = build_model(tmp_path / "a")
    assert rebuilt.generation_config.max_new_tokens == 5


class Plain(torch.nn.Module):
    """A module of one's own: a buffer that is saved, one that is not, and tied weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 8)
        self.last.weight = self.first.weight
        self.norm.running_mean += 0.5
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def _export_plain(strategy, directory):
    launcher = Launcher(strategy, accelerator="cpu")
    launcher.launch()
    launcher.export(launcher.setup_model(Plain()), directory)
    launcher.close()


@pytest.mark.parametrize(("strategy", "ranks"), [("single", 1), ("ddp", 2), ("fsdp1", 2), ("fsdp2", 2)])
def test_any_module_is_written_by_the_names_of_its_state_dict(strategy, ranks, tmp_path):
    run_ranks(_export_plain, ranks, strategy, tmp_path / "a", init=False)
    run_ranks(_export_plain, ranks, strategy, tmp_path / "a", init=False)  # over an export that is there
    found, expected = load_file(tmp_path / "a" / "model.safetensors"), Plain().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    Plain().load_state_dict(found)


def test_tensors_of_any_module_are_cast_and_cut_into_files(tmp_path):
    export_tensors(None, Plain().state_dict().items(), tmp_path / "a", dtype=torch.bfloat16, max_shard_size=64)
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == Plain().state_dict().keys()
    written = load_file(tmp_path / "a" / index["norm.num_batches_tracked"])
    assert written["norm.num_batches_tracked"].dtype is torch.int64
