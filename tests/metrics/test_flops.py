"""FLOPs against published arithmetic, PyTorch's own counter, and the attention weights transformers computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.models.tiny import TEXT_MODELS, tiny_config
from veomni.metrics import FlopsCounter

# GFLOP per token at 4096 and 8192 tokens: 6N, then full and causal; /work/shared/research/performance-anchors.md, 0.
PUBLISHED = {
    "qwen3_0.6b": (3.58, (6.39, 9.21), (4.99, 6.39)),
    "qwen3_4b": (24.13, (31.4, 38.6), (27.8, 31.4)),
    "llama3_8b": (45.03, (51.5, 57.9), (48.2, 51.5)),
    "qwen3_8b": (45.41, (52.7, 59.9), (49.0, 52.7)),
    "qwen3_32b": (191.9, (217.7, 243.4), (204.8, 217.7)),
    "qwen3_30b_a3b": (18.25, (27.9, 37.6), (23.1, 27.9)),
}
_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
SHAPES = {
    "qwen3_0.6b": {**_QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                   "num_attention_heads": 16, "tie_word_embeddings": True},
    "qwen3_4b": {**_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                 "num_attention_heads": 32, "tie_word_embeddings": True},
    "qwen3_8b": {**_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                 "num_attention_heads": 32, "tie_word_embeddings": False},
    "qwen3_32b": {**_QWEN3, "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
                  "num_attention_heads": 64, "tie_word_embeddings": False},
    "llama3_8b": {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
                  "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "qwen3_30b_a3b": {"model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48,
                      "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
                      "num_experts_per_tok": 8, "moe_intermediate_size": 768, "tie_word_embeddings": False},
}  # fmt: skip


def build(config, device="meta") -> nn.Module:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")


def tiny(name: str, device: str = "cpu", **changes) -> nn.Module:
    torch.manual_seed(0)
    return build(tiny_config(name, **changes), device).to(torch.float64)


def measured(model: nn.Module, tokens: int, backward: bool = False) -> int:
    """What PyTorch counts in one row: products with weights, and the whole square of eager attention."""
    ids = torch.randint(0, 128, (1, tokens), generator=torch.Generator().manual_seed(1))
    with FlopCounterMode(display=False) as counter:
        output = model(input_ids=ids, labels=ids)
        if backward:
            output.loss.backward()
    # transformers before 5.23 makes rotary angles by an outer product, which is counted though no weight is in it.
    rotary = [counts for name, counts in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(sum(counts.values()) for counts in rotary)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_flops_per_token(name) -> None:
    shape = dict(SHAPES[name])
    counter = FlopsCounter.from_model(build(CONFIG_MAPPING[shape.pop("model_type")](**shape)))
    linear, full, causal = PUBLISHED[name]
    assert counter.linear / 1e9 == pytest.approx(linear, abs=0.006 if linear < 100 else 0.06)
    for tokens, expected_full, expected_causal in zip((4096, 8192), full, causal, strict=True):
        flops = counter.step_flops([tokens])
        tolerance = 0.0051 if expected_causal < 7 and expected_full < 10 else 0.051
        assert flops.full / tokens / 1e9 == pytest.approx(expected_full, abs=tolerance)
        assert flops.causal / tokens / 1e9 == pytest.approx(expected_causal, abs=tolerance)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_forward_and_backward_equal_what_pytorch_counts(name) -> None:
    model, tokens = tiny(name), 24
    counter = FlopsCounter.from_model(model)
    assert counter.step_flops([tokens]).full == measured(model, tokens, backward=True)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_causal_pairs_are_those_with_attention_weight(name) -> None:
    model, tokens = tiny(name), 11
    counter = FlopsCounter.from_model(model)
    ids = torch.arange(tokens)[None]
    weights = model(input_ids=ids, output_attentions=True).attentions  # [layer] of [batch, heads, query, key]
    pairs = [int((layer[0, 0] > 0).sum()) for layer in weights]
    flops = counter.step_flops([tokens])
    per_pair = sum(counter.attention.values()) / len(pairs)
    assert flops.causal - counter.linear * tokens == per_pair * sum(pairs)
    assert flops.full - counter.linear * tokens == per_pair * len(pairs) * tokens**2


def test_documents_add_up_and_attend_to_themselves_only() -> None:
    counter = FlopsCounter.from_model(tiny("gemma3_text"))
    lengths = [1, 3, 4, 5, 30]
    together = counter.step_flops(torch.tensor(lengths))
    alone = [counter.step_flops([length]) for length in lengths]
    assert together.causal == sum(flops.causal for flops in alone)
    assert together.full == sum(flops.full for flops in alone)
    assert together.full < counter.step_flops([sum(lengths)]).full


def test_the_device_and_the_storage_do_not_matter() -> None:
    assert (
        FlopsCounter.from_model(tiny("qwen3_moe")).linear == FlopsCounter.from_model(tiny("qwen3_moe", "meta")).linear
    )


def test_more_experts_cost_only_their_router() -> None:
    few, many = (FlopsCounter.from_model(tiny("qwen3_moe", num_experts=experts)) for experts in (4, 16))
    assert many.linear - few.linear == 6 * (16 - 4) * 32 * 2  # hidden size 32, two layers


@pytest.mark.parametrize(
    "frozen", [("embed",), ("mlp",), ("embed", "layers.0."), ("embed", "layers."), ("embed", "layers.", "norm", "head")]
)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_frozen_parameters(name, frozen) -> None:
    model, tokens = tiny(name), 16
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in key for part in frozen))
    backward = any(parameter.requires_grad for parameter in model.parameters())
    assert FlopsCounter.from_model(model).step_flops([tokens]).full == measured(model, tokens, backward)


def test_tied_heads_are_counted_and_embeddings_are_not() -> None:
    tied, untied = (FlopsCounter.from_model(tiny("llama", tie_word_embeddings=tie)) for tie in (True, False))
    assert tied.linear == untied.linear
    larger = FlopsCounter.from_model(tiny("llama", vocab_size=256))
    assert larger.linear - untied.linear == 6 * 128 * 32


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]}, "conv1d"),
        ("diffllama", {}, "lambda_q1"),
        ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2}, "has a part 'c_attn'"),
        ("llama4_text", {"num_local_experts": 2}, "chunked_attention"),
        ("doge", {}, "has a parameter 'A'"),
        ("gemma4_text", {"global_head_dim": 16}, "layers differ"),
    ],
)
def test_what_is_not_understood_is_not_guessed(model_type, changes, reason, caplog) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    model = build(CONFIG_MAPPING[model_type](**{**sizes, **changes}))
    assert FlopsCounter.from_model(model) is None
    said = [record.getMessage() for record in caplog.records if record.name == "veomni.metrics.flops"]
    assert len(said) == 1
    assert reason in said[0]


def test_a_module_without_configuration_is_not_guessed() -> None:
    assert FlopsCounter.from_model(nn.Linear(4, 4)) is None


def test_the_configurations_shipped_are_countable() -> None:
    folder = Path(__file__).parents[2] / "configs" / "model_configs"
    for path in folder.glob("*.json"):
        values = json.loads(path.read_text())
        if "vision_config" in values:  # tests/metrics/test_encoder_flops.py
            continue
        values["num_hidden_layers"], values["layer_types"] = 1, None
        config = CONFIG_MAPPING[values.pop("model_type")](**values)
        assert FlopsCounter.from_model(build(config)) is not None, path
