"""Load-balancing loss and z-loss: every gradient as transformers' own loss over the whole batch in one process."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.moe.steps import ALL_LAYOUTS, AUX, Z, balanced_step, balanced_truth
from tests.together import Job
from veomni.models.adapter.adapter import ModelAdapter
from veomni.moe import MoEOptions
from veomni.moe.routers import RouterHook
from veomni.testing.oracle import BOUNDS, check
from veomni.testing.ranks import run_ranks

OPTIONS = MoEOptions(aux_loss_coef=AUX, z_loss_coef=Z)
truth = functools.cache(balanced_truth)


@pytest.fixture(autouse=True, scope="module")
def _warm():
    """What ranks are forked from knows transformers already."""
    truth("qwen3_moe", AUX, Z)


def agrees(results, expected, bound=1e-12) -> None:
    known, numbers = expected
    for outcome, metrics, _ in results:
        check(outcome, known, bound)
        for name, value in numbers.items():
            assert metrics[name] == pytest.approx(value, rel=bound), name


def step_on(layout, accumulation, recompute):
    return balanced_step("qwen3_moe", layout, OPTIONS, accumulation=accumulation, recompute=recompute)


PLAIN = ["single", "ddp2", "fsdp1_full", "fsdp2_2", "hsdp_2x2", "ulysses2_fsdp2", "ulysses2_ddp_2", "ring2_fsdp1"]
STEPS = [
    # A recomputed forward counts once.
    *((layout, 1, ("none", "full", "selective")[place % 3]) for place, layout in enumerate(PLAIN)),
    *((layout, 3, ("none", "full", "selective")[place % 3]) for place, layout in enumerate(PLAIN, 1)),
    ("ep2_fsdp2_4", 3, "none"), ("ep4_chunks", 1, "full"), ("ep2_ulysses2", 3, "selective"), ("ep2_hsdp", 1, "none"),
    ("ep2_fsdp1_4", 3, "none"),
]  # fmt: skip


@pytest.mark.parametrize("case", [Job(ALL_LAYOUTS[given[0]][0], step_on, given) for given in STEPS], ids=str)
def test_layouts(case, outcomes):
    agrees(outcomes(case), truth("qwen3_moe", AUX, Z))


@pytest.mark.parametrize("model", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_architectures(model):
    agrees(run_ranks(balanced_step, 2, model, "fsdp2_2", OPTIONS, init=False), truth(model, AUX, Z))


def test_a_loss_of_each_micro_batch():
    options = MoEOptions(aux_loss_coef=AUX, z_loss_coef=Z, balance_scope="micro_batch")
    results = run_ranks(balanced_step, 1, "qwen3_moe", "single", options, init=False, accumulation=3)
    agrees(results, truth("qwen3_moe", AUX, Z, groups=3))


def test_float32():
    results = run_ranks(balanced_step, 2, "qwen3_moe", "fsdp2_2", OPTIONS, init=False, precision="fp32")
    agrees(results, truth("qwen3_moe", AUX, Z), BOUNDS["fp32"])


def compiled_step(**options):
    from torch._dynamo.utils import counters

    counters.clear()  # of what the process compiled that this one was forked from
    results = balanced_step("qwen3_moe", "fsdp2_1", OPTIONS, precision="fp32", compile="aot_eager", **options)
    return results, counters["stats"]["unique_graphs"], dict(counters["graph_break"])


def test_compiled_blocks_stay_in_one_piece():
    ((results, graphs, breaks),) = run_ranks(compiled_step, 1, init=False, timeout=240, recompute="full")
    agrees([results], truth("qwen3_moe", AUX, Z), BOUNDS["fp32"])
    assert graphs == 1
    assert not breaks


def test_the_models_own_loss_is_replaced_and_its_weight_kept():
    changes = {"output_router_logits": True, "router_aux_loss_coef": AUX}
    results = run_ranks(balanced_step, 2, "qwen3_moe", "ddp2", MoEOptions(), init=False, **changes)
    agrees(results, (truth("qwen3_moe", AUX, 0.0)[0], {"aux_loss": truth("qwen3_moe", AUX, 0.0)[1]["aux_loss"]}))


def test_no_weight_no_loss():
    options = MoEOptions(aux_loss_coef=0.0)
    changes = {"output_router_logits": True, "router_aux_loss_coef": AUX}
    for outcome, metrics, _ in run_ranks(balanced_step, 2, "qwen3_moe", "ddp2", options, init=False, **changes):
        check(outcome, truth("qwen3_moe", 0.0, 0.0)[0], 1e-12)
        assert "aux_loss" not in metrics


class CountTrainedOn(RouterHook):
    """Counts the choices of forwards with gradients, without the counting pass."""

    def __init__(self, controller):
        self.controller = controller
        self.counts: dict[str, torch.Tensor] = {}

    def observe(self, router, decision, training):
        if training:
            mask = self.controller.mask
            real = decision.indices if mask is None else decision.indices[mask]
            counted = torch.bincount(real.flatten(), minlength=router.experts)
            self.counts[router.name] = self.counts.get(router.name, 0) + counted


def step_with_dropout():
    counters = []

    def listen(launcher, model):
        controller = ModelAdapter.of(model).routers
        counters.append(CountTrainedOn(controller))
        for router in controller.routers:
            router.hooks.append(counters[0])

    _, _, load = balanced_step(
        "qwen3_moe", "single", MoEOptions(aux_loss_coef=AUX), accumulation=3, attention_dropout=0.3,
        mutate=listen,
    )  # fmt: skip
    return load, {name: counts.tolist() for name, counts in counters[0].counts.items()}


def test_the_counting_pass_draws_the_same_dropout():
    ((counted, trained_on),) = run_ranks(step_with_dropout, 1, init=False)
    assert counted == trained_on
