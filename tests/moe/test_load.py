"""The load of experts: counted over the whole step, without padding, and reported."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.models.tiny import tiny_config
from tests.moe.steps import balanced_step, micro_batches
from tests.parity.layouts import LAYOUTS, vocabulary
from veomni.data.multimodal.collate import MultimodalCollator
from veomni.errors import DataError, NonFiniteError
from veomni.launcher import Launcher
from veomni.loop.reporter import Reporter
from veomni.models import build_model
from veomni.models.adapter.adapter import ModelAdapter
from veomni.moe import ExpertLoad, MoEOptions
from veomni.moe.routers import RouterHook
from veomni.strategies.transforms.float64 import Float64Throughout
from veomni.testing.documents import global_rows
from veomni.testing.oracle import initial_model
from veomni.testing.ranks import RankFailed, run_ranks


@functools.cache
def truth(model_name: str) -> dict[str, list[int]]:
    """What the routers' own outputs say, every document run alone."""
    model = initial_model(tiny_config(model_name), "cpu")
    counts: dict[str, torch.Tensor] = {}

    def note(name, module, args, output):
        found = torch.bincount(output[2].flatten(), minlength=4)
        counts[name] = counts.get(name, 0) + found

    for name, module in model.named_modules():
        if name.endswith(("gate", "router")):
            module.register_forward_hook(functools.partial(note, name))
    rows = global_rows(vocabulary(model_name))
    with torch.no_grad(), Float64Throughout():
        for document in (document for documents in rows for document in documents):
            model(input_ids=document.tokens[None], use_cache=False)
    return {name: found.tolist() for name, found in counts.items()}


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("single", {"accumulation": 3}),
        ("fsdp2_2", {"recompute": "full"}),
        ("fsdp1_full", {"recompute": "selective"}),
        ("ulysses2_ddp_2", {"accumulation": 3}),
        ("ring2_fsdp1", {}),
    ],
)
def test_every_token_of_the_step_once_and_no_padding(layout, options):
    expected = truth("qwen3_moe")
    results = run_ranks(balanced_step, LAYOUTS[layout][0], "qwen3_moe", layout, MoEOptions(), init=False, **options)
    for _, metrics, load in results:
        assert load == expected
        violations = [max(counts) / (sum(counts) / 4) - 1 for counts in expected.values()]
        assert metrics == {
            "expert_load_max_violation": pytest.approx(max(violations)),
            "expert_load_mean_violation": pytest.approx(sum(violations) / len(violations)),
        }


def test_a_vision_language_model_counts_no_padding():
    """A text document of 30 tokens and one of 20 in rows of 40, through the collator of multimodal data."""
    expected = 2 * (30 + 20)  # top 2
    (load,) = run_ranks(vision_language_load, 1, True, init=False)
    assert {sum(counts) for counts in load.values()} == {expected}


def test_padding_that_nobody_placed_is_counted_unless_a_loss_depends_on_it():
    (load,) = run_ranks(vision_language_load, 1, False, init=False)
    assert {sum(counts) for counts in load.values()} == {2 * 2 * 40}
    with pytest.raises(RankFailed) as failed:
        run_ranks(vision_language_load, 1, False, MoEOptions(z_loss_coef=0.1), init=False)
    assert isinstance(failed.value.exceptions[0], DataError)


def vision_language_load(placed, options=None):
    config = tiny_config("qwen3_vl_moe")
    launcher = Launcher("single", accelerator="cpu", precision="fp32")
    launcher.launch()
    model = launcher.setup_model(build_model(config, weights="random"), router=options).train()
    documents = [
        {"input_ids": torch.arange(2, 2 + length), "labels": torch.arange(2, 2 + length)} for length in (30, 20)
    ]
    batch = MultimodalCollator(config, max_seq_len=40)([[document] for document in documents])
    if not placed:
        batch = replace(batch, rows=replace(batch.rows, row_lengths=None))
    for step in launcher.track([[batch]]):
        for micro in launcher.accumulate(model, step):
            launcher.backward(model(**micro.inputs).loss, micro)
    load = ModelAdapter.of(model).routers.load
    launcher.close()
    return {name: sent.tolist() for name, sent in zip(load.names, load.assignments, strict=True)}


def test_violations():
    load = ExpertLoad(("even", "one", "none"), tuple(map(torch.tensor, ([3, 3, 3], [0, 9, 0], [0, 0, 0]))))
    assert load.violations().tolist() == [0.0, 2.0, 0.0]


def test_dense_models_report_nothing():
    ((_, metrics, load),) = run_ranks(balanced_step, 1, "llama", "single", MoEOptions(), init=False)
    assert metrics == load == {}


def reported_run(output_dir, layout, steps, resume_from=0):
    launcher = Launcher(
        LAYOUTS[layout][1](), accelerator="cpu", backend="gloo", precision="fp32", timeout_seconds=60,
        reporter=Reporter(output_dir, plot=True),
    )  # fmt: skip
    launcher.launch()
    model = launcher.setup_model(
        build_model(tiny_config("qwen3_moe", num_experts=6), weights="random"), router=MoEOptions(log_load_every=2)
    ).train()
    if resume_from:
        launcher.step = resume_from
        launcher.reporter.resume_from(resume_from)
    place = launcher.data_parallel
    loader = [micro_batches(global_rows(vocabulary("qwen3_moe")), place.rank, place.size, 1)] * (steps - resume_from)
    for batch in launcher.track(loader, max_steps=steps):
        for micro in launcher.accumulate(model, batch):
            launcher.backward(model(**micro.inputs).loss, micro)
        launcher.log({"loss": launcher.global_loss(batch)})
        model.zero_grad()
    launcher.close()


def test_files_of_a_run(tmp_path):
    run_ranks(reported_run, 2, tmp_path, "fsdp2_2", 5, init=False)
    lines = [json.loads(line) for line in (tmp_path / "expert_load.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    tokens = sum(len(document.tokens) for row in global_rows(vocabulary("qwen3_moe")) for document in row)
    for counts in lines[0]["tokens_per_expert"].values():
        assert len(counts) == 6
        assert sum(counts) == 2 * tokens
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    loads = lines[0]["tokens_per_expert"].values()
    assert metrics[1]["expert_load_max_violation"] == pytest.approx(max(max(c) / (sum(c) / 6) - 1 for c in loads))
    with Image.open(tmp_path / "expert_load.png") as picture:
        assert len(set(picture.convert("RGB").resize((90, 70)).tobytes())) > 20

    run_ranks(reported_run, 2, tmp_path, "fsdp2_2", 6, 3, init=False)
    lines = [json.loads(line) for line in (tmp_path / "expert_load.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6], "line 4 was written again, once"


def one_token_breaks(launcher, model):
    router = ModelAdapter.of(model).routers.routers[1]

    class Spoil(RouterHook):
        def choose(self, router, routing):
            if launcher.rank == 1:
                routing.logits[3, 2] = float("inf")

    router.hooks.append(Spoil())


@pytest.mark.parametrize(("layout", "accumulation"), [("ddp2", 1), ("ulysses2_fsdp2", 3)])
def test_logits_that_are_not_finite_stop_all_ranks(layout, accumulation):
    with pytest.raises(RankFailed) as failed:
        run_ranks(
            balanced_step, 2, "qwen3_moe", layout, MoEOptions(), init=False, accumulation=accumulation,
            mutate=one_token_breaks,
        )  # fmt: skip
    assert set(failed.value.exceptions) == {0, 1}
    for error in failed.value.exceptions.values():
        assert isinstance(error, NonFiniteError)
        assert "model.layers.1.mlp.gate" in str(error)
        assert "model.layers.0" not in str(error)
