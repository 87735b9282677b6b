"""Plans of many architectures, from their modules alone."""

from __future__ import annotations

import pytest
from torch import nn

from tests.models.tiny import OTHER_MODELS, TEXT_MODELS, tiny_config
from veomni.models import build_model, derive_plan
from veomni.parallel.plan import ParallelPlan


def numbered(prefix: str, count: int = 2) -> list[str]:
    return [f"{prefix}.{index}" for index in range(count)]


BLOCKS = {
    **{name: numbered("model.layers") for name in TEXT_MODELS},
    "gpt2": numbered("transformer.h"),
    "t5": [*numbered("encoder.block"), *numbered("decoder.block")],
    "whisper": [*numbered("model.encoder.layers"), *numbered("model.decoder.layers")],
    "qwen2_5_vl": [*numbered("model.visual.blocks"), *numbered("model.language_model.layers")],
    "qwen3_vl": [*numbered("model.visual.blocks"), *numbered("model.language_model.layers")],
    "qwen3_vl_moe": [*numbered("model.visual.blocks"), *numbered("model.language_model.layers")],
    "nomic_bert": numbered("layers"),
    "llava": [*numbered("model.vision_tower.encoder.layers"), *numbered("model.language_model.layers")],
    "qwen3_next": numbered("model.layers", 4),
}


@pytest.mark.parametrize("name", [*TEXT_MODELS, *OTHER_MODELS])
def test_blocks_are_the_repeated_layers_of_every_tower(name):
    model = build_model(tiny_config(name))
    blocks = list(derive_plan(model).blocks)
    assert blocks == BLOCKS[name]
    inside = [key for key, _ in model.named_parameters() if any(key.startswith(f"{block}.") for block in blocks)]
    assert len(inside) > 0.6 * len(list(model.parameters()))


@pytest.mark.parametrize(
    ("name", "embeddings", "heads"),
    [
        ("llama", ("model.embed_tokens",), ("lm_head",)),
        ("llava", ("model.language_model.embed_tokens",), ("lm_head",)),
        ("qwen3", (), ()),  # tied
        ("t5", (), ()),  # shared by encoder and decoder
        ("gemma3_text", (), ()),  # scales what it looks up
        ("nomic_bert", ("embeddings.word_embeddings",), ()),
    ],
)
def test_embeddings_and_heads_with_weights_of_their_own(name, embeddings, heads):
    plan = derive_plan(build_model(tiny_config(name)))
    assert (plan.embeddings, plan.heads) == (embeddings, heads)


def test_modules_that_stay_in_float32():
    assert derive_plan(build_model("ernie4_5_moe", overrides=_ERNIE)).keep_fp32 == ("model.layers.1.mlp.gate",)
    # gpt_oss lists its norms for float16 only
    assert derive_plan(build_model(tiny_config("gpt_oss"))).keep_fp32 == ()


_ERNIE = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1,
}  # fmt: skip


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))


class _Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(_Block() for _ in range(3))
        self.odd = nn.ModuleList([nn.Linear(2, 2), nn.LayerNorm(2)])
        self.silent = nn.ModuleList(nn.ReLU() for _ in range(2))


def test_plain_modules_are_split_at_their_outermost_lists():
    assert derive_plan(_Plain()) == ParallelPlan(blocks=("layers.0", "layers.1", "layers.2"))
    assert derive_plan(nn.Linear(2, 2)) == ParallelPlan()


def test_a_models_own_plan_wins():
    model = _Plain()
    model.get_parallel_plan = lambda: ParallelPlan(blocks=("odd",))
    assert derive_plan(model).blocks == ("odd",)


def test_frozen_parts_are_blocks_too():
    model = _Plain().requires_grad_(False)
    assert len(derive_plan(model).blocks) == 3
