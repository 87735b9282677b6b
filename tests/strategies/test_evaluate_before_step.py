"""A forward without a backward between backward and optimizer step changes no step."""

from __future__ import annotations

import pytest
import torch

from tests.models.tiny import tiny_config
from veomni.launcher import Launcher
from veomni.models import build_model
from veomni.strategies import DDP, FSDP1, FSDP2, ExpertParallel, Ulysses
from veomni.testing.documents import global_rows, pack
from veomni.testing.ranks import run_ranks

LAYOUTS = {
    "ddp": (2, "llama", lambda: DDP()),
    "fsdp1": (2, "llama", lambda: FSDP1()),
    "fsdp1 grad_op": (2, "llama", lambda: FSDP1(sharding="grad_op")),
    "fsdp1 hybrid": (4, "llama", lambda: FSDP1(replicate=2)),
    "fsdp1 experts": (2, "qwen3_moe", lambda: [FSDP1(), ExpertParallel(2)]),
    "fsdp1 x ulysses": (2, "llama", lambda: [FSDP1(), Ulysses(2)]),
    "fsdp2": (2, "llama", lambda: FSDP2()),
    "fsdp2 experts": (2, "qwen3_moe", lambda: [FSDP2(), ExpertParallel(2)]),
}


def losses(layout: str, evaluate: bool) -> list[float]:
    _, name, strategies = LAYOUTS[layout]
    launcher = Launcher(strategies(), accelerator="cpu", backend="gloo", precision="fp64")
    launcher.launch()
    model = launcher.setup_model(build_model(tiny_config(name), weights="random")).train()
    optimizer = launcher.setup_optimizer(model, torch.optim.SGD, lr=0.5)
    rows = global_rows(128)
    micro_batches = [pack(rows[launcher.data_parallel.rank :: launcher.data_parallel.size])]
    found = []
    for batch in launcher.track([micro_batches] * 3):
        for micro in launcher.accumulate(model, batch):
            launcher.backward(model(**micro.inputs).loss, micro)
        found.append(float(launcher.global_loss(batch)))
        if evaluate:
            held_out = launcher.evaluate(model, [micro_batches])
            assert held_out["eval_loss"] == pytest.approx(found[-1], rel=1e-12)
        optimizer.step()
        optimizer.zero_grad()
    launcher.close()
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_are_the_same(layout: str) -> None:
    ranks = LAYOUTS[layout][0]
    expected, *_ = run_ranks(losses, ranks, layout, False, init=False)
    assert expected[0] > expected[1] > expected[2]
    for found in run_ranks(losses, ranks, layout, True, init=False):
        assert found == pytest.approx(expected, rel=1e-12)
