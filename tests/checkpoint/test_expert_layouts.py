"""A mixture-of-experts run, saved on one layout of experts and resumed on another, through the launcher."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # every rank would import it in its first optimizer step
from torch import Tensor

from tests.models.layouts import materialized
from tests.models.tiny import tiny_config
from tests.optim.layouts import whole
from tests.parity.layouts import EXPERT_LAYOUTS, LAYOUTS, vocabulary
from tests.together import Job, Together
from veomni.checkpoint import Checkpointer
from veomni.checkpoint.sharded_state import sharded_state
from veomni.errors import CheckpointError, ModelError
from veomni.launcher import Launcher
from veomni.models import build_model
from veomni.optim import build_optimizer, build_scheduler
from veomni.strategies import FSDP2, ExpertParallel
from veomni.testing.documents import global_rows, share
from veomni.testing.ranks import RankFailed, run_ranks

ALL = {**LAYOUTS, **EXPERT_LAYOUTS}
PRECISIONS = {"adamw_bf16": ("fp32", 1e-5)}
"""Of optimizers that do not step in float64, and how far their losses are from those of another layout."""


def train(
    directory: Path, layout: str, name: str, steps: int, *, load: bool, accelerator: str = "cpu"
) -> tuple[dict[str, Any], list[float]]:
    """Train, save at the end; return what a checkpoint holds (as resumed, or as saved), unsharded, and the losses."""
    precision, _ = PRECISIONS.get(name, ("fp64", 0.0))
    launcher = Launcher(ALL[layout][1](), accelerator=accelerator, precision=precision, timeout_seconds=60)
    launcher.launch()
    model = launcher.setup_model(build_model(tiny_config("qwen3_moe"), weights="random")).train()
    optimizer = build_optimizer(model, name=name, lr=1e-2, no_decay=())
    scheduler = build_scheduler(optimizer, name="wsd", total_steps=4, warmup_steps=1, min_lr_ratio=0, decay_ratio=0.5)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    checkpointer = Checkpointer(directory)
    found, losses = {}, []
    if load:
        assert checkpointer.load_latest(state) == 2
        found = everything(state)
    place = launcher.data_parallel
    rows = share(global_rows(vocabulary("qwen3_moe")), place.rank, place.size, 1)
    for batch in launcher.track([rows] * steps):
        for micro in launcher.accumulate(model, batch):
            launcher.backward(model(**micro.inputs).loss, micro)
        losses.append(launcher.global_loss(batch).item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    if not load:
        checkpointer.save(state, 2)
        found = everything(state)
    checkpointer.close()
    launcher.close()
    return found, losses


def everything(state: dict[str, Any]) -> dict[str, Any]:
    table = sharded_state(state["model"], state["optimizer"])
    return {
        name: whole(value).cpu().clone() if isinstance(value, Tensor) else value
        for name, value in table.items()
        if not name.endswith((".fused", ".foreach"))
    }


CASES = [
    ("muon", "ep4_chunks", "single"),
    ("muon", "ep4_chunks", "ep2_fsdp2_4"),
    ("muon", "ep2_hsdp", "ep4_ulysses2"),
    ("adamw_bf16", "ep4_chunks", "ep2_hsdp"),
    ("adamw", "ep4_chunks", "fsdp2_4"),
    ("adamw", "ep4_chunks", "ep2_ulysses2"),
    ("adamw", "ep4_chunks", "single"),
    ("adamw", "ep2_fsdp1_4", "single"),
    ("adamw", "ep2_fsdp1_4", "ep2_fsdp2_4"),
    ("adamw", "ep2_fsdp1_hybrid", "ep2_fsdp1"),
]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], tuple[Any, Any, Any]]:
    """Return a run of four steps, what a layout saves after two, and what another makes of it: each once."""
    folder = tmp_path_factory.mktemp("experts")

    def job(name: str, source: str, layout: str, steps: int, load: bool) -> Job:
        return Job(ALL[layout][0], partial(train, folder / f"{name}-{source}", layout, name, steps, load=load))

    whole = {name: job(name, "unbroken", "single", 4, False) for name, _, _ in CASES}
    saves = {(name, source): job(name, source, source, 2, False) for name, source, _ in CASES}
    loads = {case: job(*case, 2, True) for case in CASES}
    saving, loading = Together([*whole.values(), *saves.values()]), Together(list(loads.values()))
    saved = {key: saving(one)[0] for key, one in {**whole, **saves}.items()}
    return lambda *case: (saved[case[0]], saved[case[:2]], loading(loads[case]))


@pytest.mark.parametrize(("name", "source", "target"), CASES)
def test_weights_and_optimizer_are_bitwise_and_the_losses_go_on(jobs, name, source, target):
    (_, expected), (saved, before), resumed = jobs(name, source, target)
    _, bound = PRECISIONS.get(name, ("fp64", 1e-10))
    for found, after in resumed:
        assert before + after == pytest.approx(expected, rel=bound)
        assert found.keys() == saved.keys()
        for key, value in saved.items():
            assert torch.equal(found[key], value) if isinstance(value, Tensor) else found[key] == value, key


def resume_with(directory: Path, experts: int, *, save: bool) -> None:
    launcher = Launcher([FSDP2(), ExpertParallel(2)], accelerator="cpu", precision="fp32", timeout_seconds=60)
    launcher.launch()
    config = tiny_config("qwen3_moe", num_experts=experts)
    state = {"model": launcher.setup_model(build_model(config, weights="random"))}
    checkpointer = Checkpointer(directory)
    if save:
        checkpointer.save(state, 1)
    else:
        checkpointer.load(state, directory / "global_step_1")
    checkpointer.close()
    launcher.close()


def test_a_checkpoint_with_another_number_of_experts_is_rejected(tmp_path):
    run_ranks(resume_with, 2, tmp_path, 4, save=True, init=False)
    with pytest.raises(RankFailed) as caught:
        run_ranks(resume_with, 2, tmp_path, 8, save=False, init=False)
    error = caught.value.exceptions[0]
    assert isinstance(error, CheckpointError)
    assert "experts.down_proj (4, 32, 16) there, (8, 32, 16) here" in error.problem
    assert "of the run that saved it" in error.fix


def test_weights_with_another_number_of_experts_are_rejected(tmp_path):
    materialized(tiny_config("qwen3_moe")).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        materialized(tiny_config("qwen3_moe", num_experts=8), weights=tmp_path)
    assert "experts" in caught.value.problem
    assert "use the config.json that belongs to the weights" in caught.value.fix
