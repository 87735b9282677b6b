"""Models and configurations from names, files and directories, and what is rejected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from tests.models.layouts import logits, materialized
from tests.models.tiny import tiny_config
from veomni.errors import EXIT_BAD_INPUT, ConfigError, ModelError
from veomni.models import (
    MODEL_CONFIG_REGISTRY,
    MODEL_PROCESSOR_REGISTRY,
    MODELING_REGISTRY,
    build_config,
    build_model,
    build_processor,
    build_tokenizer,
)
from veomni.models.build.backends import resolve_experts

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def write(directory, **values):
    directory.mkdir(exist_ok=True)
    config = json.loads(tiny_config("llama").to_json_string()) | values
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_a_name_gives_transformers_defaults_without_cache():
    config = build_config("qwen3", {"hidden_size": 32})
    assert isinstance(config, transformers.Qwen3Config)
    assert (config.hidden_size, config.vocab_size, config.use_cache) == (32, 151936, False)


def test_a_directory_a_file_and_a_file_of_another_name(tmp_path):
    write(tmp_path)
    (tmp_path / "tiny.json").write_text((tmp_path / "config.json").read_text())
    for source in (tmp_path, tmp_path / "config.json", tmp_path / "tiny.json", str(tmp_path)):
        config = build_config(source, {"vocab_size": 64})
        assert (config.model_type, config.hidden_size, config.vocab_size) == ("llama", 32, 64)


def test_overrides_of_nested_configurations():
    config = build_config("llava", {"text_config": {"hidden_size": 64}})
    assert config.text_config.hidden_size == 64
    assert config.text_config.use_cache is False
    with pytest.raises(ModelError, match="text_config has no key 'hiden_size'") as error:
        build_config("llava", {"text_config": {"hiden_size": 64}})
    assert "did you mean 'hidden_size'" in error.value.fix


def test_derived_values_follow_the_overrides():
    assert build_config("llama", {"hidden_size": 64, "num_attention_heads": 4}).head_dim == 16
    assert len(build_config("gemma3_text", {"num_hidden_layers": 7}).layer_types) == 7


def test_the_local_cache_is_searched_by_hub_name(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    write(snapshot)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert build_config("org/name").hidden_size == 32
    with pytest.raises(ModelError, match="no model directory"):
        build_config("org/other")


def test_a_model_is_float32_on_meta_and_trains():
    model = build_model("llama", overrides={**SMALL, "vocab_size": 128, "intermediate_size": 48})
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float32)}
    assert model.config._attn_implementation == "sdpa"
    assert model.config.architectures == ["LlamaForCausalLM"]


def test_the_architecture_of_the_file_is_built(tmp_path):
    write(tmp_path, architectures=["LlamaForSequenceClassification"])
    assert type(build_model(tmp_path)) is transformers.LlamaForSequenceClassification


@pytest.mark.parametrize("name", ["qwen2_audio", "omni"])
def test_encoders_that_mask_padding_keep_an_attention_that_takes_masks(name):
    from tests.models.multimodal import family_config
    from veomni.models.build.backends import resolve_attention

    composed = Path(__file__).parents[2] / "configs/model_configs/tiny_omni.json"
    model = build_model(family_config(name) if name == "qwen2_audio" else composed, weights="random")
    resolve_attention(model, torch.device("cpu"), varlen=True)
    assert model.config.get_text_config()._attn_implementation == "varlen"
    assert model.config.audio_config._attn_implementation == "sdpa"


def test_attention_by_name():
    assert build_model(tiny_config("llama"), attention="eager").config._attn_implementation == "eager"
    assert build_model(tiny_config("gpt_oss")).config._attn_implementation == "eager"
    with pytest.raises(ModelError, match="no attention is called 'spda'") as error:
        build_model(tiny_config("llama"), attention="spda")
    assert "did you mean 'sdpa'" in error.value.fix
    with pytest.raises(ModelError, match="GptOssForCausalLM cannot be built"):
        build_model(tiny_config("gpt_oss"), attention="sdpa")


def test_capped_scores_are_never_left_out():
    # transformers 5.17 lets sdpa run Gemma 2 without its soft cap, and says nothing
    assert build_model(tiny_config("gemma2")).config._attn_implementation == "eager"
    with pytest.raises(ModelError, match="Gemma2ForCausalLM caps its attention scores"):
        build_model(tiny_config("gemma2"), attention="sdpa")


@pytest.fixture
def registered():
    entries = [registry._entries for registry in (MODEL_CONFIG_REGISTRY, MODELING_REGISTRY, MODEL_PROCESSOR_REGISTRY)]
    before = [dict(table) for table in entries]
    yield
    for table, old in zip(entries, before, strict=True):
        table.clear()
        table.update(old)


def test_a_registered_model_is_found_by_name_and_by_file(registered, tmp_path):
    class YourConfig(transformers.LlamaConfig):
        model_type = "your_model"

    class YourModel(transformers.LlamaForCausalLM):
        config_class = YourConfig

    asked = []

    @MODEL_CONFIG_REGISTRY.register("your_model")
    def register_config():
        return YourConfig

    @MODELING_REGISTRY.register("your_model")
    def register_modeling(architecture):
        asked.append(architecture)
        return YourModel

    values = json.loads(tiny_config("llama").to_json_string())
    values |= {"model_type": "your_model", "architectures": ["YourModelForAnything"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert type(build_config("your_model")) is YourConfig
    model = materialized(tmp_path)
    assert type(model) is YourModel
    assert asked == ["YourModelForAnything"]
    assert logits(model).shape == (1, 12, 128)
    with pytest.raises(ConfigError, match="registered twice"):
        MODELING_REGISTRY.register("your_model")(lambda architecture: YourModel)


def test_a_registered_model_may_be_a_plain_module(registered):
    class Config(transformers.PreTrainedConfig):
        model_type = "plain"
        width: int = 3

    class Plain(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.layer = nn.Linear(config.width, 1)

    MODEL_CONFIG_REGISTRY.register("plain")(lambda: Config)
    MODELING_REGISTRY.register("plain")(lambda architecture: Plain)
    assert materialized("plain", overrides={"width": 5}).layer.weight.shape == (1, 5)


def test_a_registered_processor_comes_first(registered, tmp_path):
    class Processor:
        @classmethod
        def from_pretrained(cls, directory, **kwargs):
            return (cls, directory)

    MODEL_PROCESSOR_REGISTRY.register("llama")(lambda: Processor)
    assert build_processor(write(tmp_path)) == (Processor, tmp_path)


def test_tokenizers(tmp_path):
    from tokenizers import Tokenizer, models

    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")))
    fast.save_pretrained(tmp_path)
    assert build_tokenizer(tmp_path)("b").input_ids == [1]


def damage(directory, what):
    """Make a model directory that is wrong in one way."""
    write(directory)
    files = {
        "no config": lambda: (directory / "config.json").unlink(),
        "config is no JSON": lambda: (directory / "config.json").write_text("{"),
        "config is a list": lambda: (directory / "config.json").write_text("[]"),
        "config without type": lambda: (directory / "config.json").write_text("{}"),
        "unknown type": lambda: write(directory, model_type="llma"),
        "own code": lambda: write(directory, model_type="mine", auto_map={"AutoConfig": "evil.Config"}),
        "asks for trust": lambda: write(directory, trust_remote_code=True),
        "asks for trust inside": lambda: write(directory, text_config={"trust_remote_code": True}),
        "attention from the hub": lambda: write(directory, _attn_implementation_internal="evil/kernel"),
        "experts from the hub": lambda: write(directory, experts_implementation="evil/kernel"),
        "wrong value": lambda: write(directory, hidden_size="many"),
        "impossible value": lambda: write(directory, num_attention_heads=0),
        "pickle only": lambda: (directory / "pytorch_model.bin").write_bytes(b""),
        "quantised": lambda: _quantised(directory),
        "corrupt header": lambda: (directory / "model.safetensors").write_bytes(b"\xff" * 64),
        "empty file": lambda: (directory / "model.safetensors").write_bytes(b""),
        "index is no JSON": lambda: _index(directory, "{"),
        "index without map": lambda: _index(directory, "{}"),
        "missing shards": lambda: _index(directory, '{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'),
        "index escapes": lambda: _index(directory, '{"weight_map": {"a": "../../etc/passwd"}}'),
        "shard lacks tensor": lambda: _hollow(directory),
    }  # fmt: skip
    files[what]()
    return directory


def _index(directory, text):
    (directory / "model.safetensors.index.json").write_text(text)


def _quantised(directory):
    from safetensors.torch import save_file

    write(directory, quantization_config={"quant_method": "mxfp4"})
    save_file({"a": torch.ones(1)}, directory / "model.safetensors")


def _hollow(directory):
    from safetensors.torch import save_file

    save_file({"b": torch.ones(1)}, directory / "one.safetensors")
    _index(directory, json.dumps({"weight_map": {"a": "one.safetensors"}}))


BAD = {
    "no config": (r"there is no .*config\.json", "give a model directory"),
    "config is no JSON": ("is not JSON", "correct the file"),
    "config is a list": ("names no model_type", "config.json"),
    "config without type": ("names no model_type", "config.json"),
    "unknown type": ("no model type is called 'llma'", "did you mean 'llama'"),
    "own code": ("brings its own code", "trust_remote_code=True"),
    "asks for trust": ("sets trust_remote_code", "remove trust_remote_code"),
    "asks for trust inside": ("sets trust_remote_code", "remove trust_remote_code"),
    "attention from the hub": ("sets _attn_implementation_internal", "remove"),
    "experts from the hub": ("sets experts_implementation", "remove"),
    "wrong value": ("hidden_size", "correct the values"),
    "impossible value": ("division|divi|zero", "correct"),
    "pickle only": (r"only as pickle \(pytorch_model\.bin\)", "convert"),
    "quantised": ("quantised", "dequantise"),
    "corrupt header": (r"model\.safetensors is damaged", "again"),
    "empty file": (r"model\.safetensors is damaged", "again"),
    "index is no JSON": (r"index\.json is damaged", "again"),
    "index without map": (r"index\.json is damaged", "again"),
    "missing shards": ("lacks shards that its index lists: model-00002-of-00002", "again"),
    "index escapes": ("outside its directory", "again"),
    "shard lacks tensor": ("its shards lack them", "again"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_directories_are_rejected_with_the_fix(what, tmp_path):
    problem, fix = BAD[what]
    directory = damage(tmp_path / "model", what)
    with pytest.raises(ModelError, match=problem) as error:
        materialized(directory)
    assert fix in error.value.fix
    assert error.value.exit_code == EXIT_BAD_INPUT


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda path: build_config("lama"), "no model type is called 'lama'"),
        (lambda path: build_config(path / "nowhere"), "no model directory"),
        (lambda path: build_config(path / "nowhere.json"), "there is no"),
        (lambda path: build_config("llama", {"hiden_size": 1}), "has no key 'hiden_size'"),
        (lambda path: build_model("llama", overrides=SMALL, weights=path / "nowhere"), "is no directory"),
        (lambda path: build_model("llama", overrides=SMALL, weights=path), r"no model\.safetensors"),
        (lambda path: build_tokenizer(path / "nowhere"), "is no directory"),
        (lambda path: build_tokenizer(path), "no usable tokenizer"),
        (lambda path: build_processor(path), "no usable processor"),
    ],
)
def test_bad_arguments(call, problem, tmp_path):
    with pytest.raises(ModelError, match=problem):
        call(tmp_path)


def test_a_native_model_with_leftover_code_is_built_natively(tmp_path):
    write(tmp_path, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('ran')")
    assert type(build_model(tmp_path)) is transformers.LlamaForCausalLM


def test_own_code_runs_when_the_caller_says_so(tmp_path):
    (tmp_path / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    write(tmp_path, model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})
    model = build_model(tmp_path, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert next(model.parameters()).is_meta


def test_a_backend_of_experts_is_for_models_that_have_some():
    model = build_model(tiny_config("qwen3"), weights="random", experts="loop")
    with pytest.raises(ModelError, match="experts loop was chosen, and Qwen3ForCausalLM has no experts"):
        resolve_experts(model, torch.float32, ("loop",))
