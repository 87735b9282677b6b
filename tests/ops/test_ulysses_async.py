"""Exchanges under the projections: what travels while what is computed, and which modules are refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from tests.models.tiny import tiny_config
from veomni.errors import ModelError
from veomni.launcher import Launcher
from veomni.models import build_model
from veomni.ops.attention.ulysses_async import attention_modules, why_not_overlapped
from veomni.strategies import DDP, Ulysses
from veomni.testing.ranks import RankFailed, run_ranks

WIDE = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "num_hidden_layers": 1,
    "max_position_embeddings": 4096,
}


def launched_model(config):
    launcher = Launcher([DDP(), Ulysses(2, overlap=True)], accelerator="cpu", backend="gloo", timeout_seconds=60)
    launcher.launch()
    return launcher, launcher.setup_model(build_model(config, weights="random"))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_oss", "granite"])
def test_the_standard_families_overlap(name):
    model = build_model(tiny_config(name), weights="random")
    modules = attention_modules(model)
    assert len(modules) == model.config.num_hidden_layers
    assert [why_not_overlapped(module) for _, module in modules] == [None] * len(modules)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("phi3", "no plain Linear called q_proj, k_proj, v_proj"),
        ("gpt2", "no plain Linear called q_proj"),
        ("olmo2", "q_norm normalises over all heads together"),
        ("deepseek_v3", "no plain Linear called q_proj"),
    ],
)
def test_other_forms_are_rejected_with_the_reason(name, reason):
    (_, module), *_ = attention_modules(build_model(tiny_config(name), weights="random"))
    assert reason in (why_not_overlapped(module) or "")


def test_gated_queries_and_parts_of_its_own_are_rejected():
    _, module = attention_modules(build_model(tiny_config("llama"), weights="random"))[0]
    module.q_proj = nn.Linear(32, 64)
    assert "gated" in (why_not_overlapped(module) or "")
    module.scale = nn.Linear(2, 2)
    assert "parts of its own: scale" in (why_not_overlapped(module) or "")


def setup_only(name: str) -> None:
    launched_model(tiny_config(name))


def test_a_model_is_rejected_by_the_name_of_its_layer():
    with pytest.raises(RankFailed) as caught:
        run_ranks(setup_only, 2, "phi3", init=False)
    error = caught.value.exceptions[0]
    assert isinstance(error, ModelError)
    assert "layers.0.self_attn (Phi3Attention)" in str(error)
    assert error.field == "Ulysses.overlap"


def reading_its_hidden_states() -> None:
    launcher = Launcher([DDP(), Ulysses(2, overlap=True)], accelerator="cpu", backend="gloo", timeout_seconds=60)
    launcher.launch()
    model = build_model(tiny_config("llama"), weights="random")
    module = model.model.layers[0].self_attn
    inner = module.forward

    def forward(hidden_states, position_embeddings=None, **kwargs):
        output, weights = inner(hidden_states, position_embeddings=position_embeddings, **kwargs)
        return output * hidden_states.abs(), weights

    module.forward = forward
    launcher.setup_model(model)


def test_a_forward_that_reads_its_hidden_states_is_rejected_at_setup():
    with pytest.raises(RankFailed) as caught:
        run_ranks(reading_its_hidden_states, 2, init=False)
    error = caught.value.exceptions[0]
    assert isinstance(error, ModelError)
    assert "attention ulysses_sdpa does not run on shards of rows" in str(error)


FOLLOWS = {"q_proj": "k_proj", "k_proj": "v_proj"}


class Projection:
    """A projection with a span of its own in the trace.

    Rank 1 hands its queries over only when rank 0 has begun with its keys, and its keys when rank 0 has begun with its
    values: exchanges that did not run beside the next projection would wait for ever.
    """

    gated = False

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name, self.forward = name, module.forward
        module.forward = self

    def __call__(self, hidden):
        store = dist.distributed_c10d._get_default_store()
        with record_function(f"project {self.name}"):
            if Projection.gated and dist.get_rank() == 0:
                store.set(f"{self.name} begun", "")
            projected = self.forward(hidden)
        if Projection.gated and dist.get_rank() == 1 and self.name in FOLLOWS:
            store.wait([f"{FOLLOWS[self.name]} begun"])
        return projected


def trace() -> list[tuple[str, int, int]]:
    """Spans of one forward and backward: name, start and end."""
    launcher = Launcher([DDP(), Ulysses(2, overlap=True)], accelerator="cpu", backend="gloo", timeout_seconds=30)
    launcher.launch()
    model = build_model(tiny_config("llama", **WIDE), weights="random")
    for name in ("q_proj", "k_proj", "v_proj"):
        Projection(getattr(model.model.layers[0].self_attn, name), name)
    model = launcher.setup_model(model)
    ids = torch.randint(1, 128, (1, 1024))
    spans = []
    for batch in launcher.track([[{"input_ids": ids, "labels": ids}] * 2]):
        for micro in launcher.accumulate(model, batch):
            Projection.gated = not micro.last
            if micro.last:  # gradients are exchanged in it as well
                launcher.backward(model(**micro.inputs).loss, micro)
                continue
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                launcher.backward(model(**micro.inputs).loss, micro)
            spans = [(e.name, e.time_range.start, e.time_range.end) for e in profiler.events()]
    launcher.close()
    return spans


def overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def flights(spans: list[tuple[str, int, int]]) -> list[tuple[int, int]]:
    """From the launch of each exchange, on the thread that computes, to its end on gloo's."""
    launched = sorted(start for name, start, _ in spans if name == "c10d::alltoall_base_")
    ended = sorted((start, end) for name, start, end in spans if name == "gloo:all_to_all")
    return [(start, end) for start, (_, end) in zip(launched, ended, strict=True)]


def test_the_trace_shows_exchanges_in_flight_while_other_projections_are_computed():
    for rank, spans in enumerate(run_ranks(trace, 2, init=False)):
        queries, keys, values, outputs, _, *back = flights(spans)
        project = {name: (start, end) for name, start, end in spans if name.startswith("project")}
        # each is sent as soon as it is ready, and none is waited for before all are projected
        assert queries[0] < project["project k_proj"][0] < keys[0] < project["project v_proj"][0]
        assert project["project v_proj"][1] < values[0] < outputs[0]
        if rank == 0:
            assert overlap(queries, project["project k_proj"])
            assert overlap(keys, project["project v_proj"])
        # the backward sends all three before it multiplies by the first projection's weight
        assert len(back) == 3
        assert back[2][0] < min(start for name, start, _ in spans if name == "aten::mm" and start > back[0][0])
