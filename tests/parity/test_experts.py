"""Experts spread over ranks: loss, norm and gradients of one process, and the same parameters after three steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from tests.models.tiny import tiny_config
from tests.parity.layouts import EXPERT_LAYOUTS, one_step, oracle, vocabulary
from veomni.launcher import Launcher
from veomni.models import Materializer, build_model
from veomni.testing import seams
from veomni.testing.documents import global_rows, share
from veomni.testing.oracle import BOUNDS, Truth, backward_of, check, initial_model
from veomni.testing.ranks import run_ranks
from veomni.testing.seams import replaced

ARCHITECTURES = ["qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "glm4_moe", "olmoe", "minimax"]
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, float]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.5}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}


@functools.cache
def truth(name: str) -> Truth:
    return oracle(name)


def run(model: str, layout: str, **options) -> None:
    precision = options.get("precision", "fp64")
    for outcome in run_ranks(one_step, EXPERT_LAYOUTS[layout][0], model, layout, init=False, **options):
        check(outcome, truth(model), BOUNDS[precision])


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("layout", list(EXPERT_LAYOUTS))
def test_every_layout(layout, accumulation):
    run("qwen3_moe", layout, accumulation=accumulation)


@pytest.mark.parametrize("layout", ["ep2_fsdp2_4", "ep4_chunks", "ep2_fsdp1_4", "ep4_ulysses2"])
@pytest.mark.parametrize("model", [name for name in ARCHITECTURES if name != "qwen3_moe"])
def test_every_architecture(model, layout):
    run(model, layout, accumulation=3)


# A choice is discrete: a token for which rounding changes it has other gradients. In these models, none has.
@pytest.mark.parametrize(("model", "precision"), [("qwen3_moe", "fp32"), ("olmoe", "bf16"), ("glm4_moe", "bf16")])
@pytest.mark.parametrize("layout", ["ep2_fsdp2_4", "ep4_fixed", "ep2_fsdp1_4", "ep2_hsdp"])
def test_lower_precisions(layout, model, precision):
    run(model, layout, precision=precision, accumulation=3)


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("layout", ["ep2_fsdp2_4", "ep4_chunks", "ep2_fsdp1_4", "ep4_ulysses2"])
def test_recomputation_changes_nothing(layout, recompute):
    run("deepseek_v3", layout, recompute=recompute, accumulation=3)


# ---------------------------------------------------------------- uneven choices


def biased(directory: Path, favour: Callable[[int], float]) -> str:
    """Write a deepseek_v3 whose correction bias decides which experts are chosen: ``favour(expert)`` is added."""
    model = build_model(tiny_config("deepseek_v3"), weights="random")
    Materializer(model, device=torch.device("cpu"), seed=0)(model)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer += torch.tensor([favour(expert) for expert in range(len(buffer))])
    model.save_pretrained(directory)
    return str(directory)


CHOICES = {
    "all_to_one_rank": lambda expert: 10.0 if expert < 2 else 0.0,
    "all_to_the_last_rank": lambda expert: 10.0 if expert >= 2 else 0.0,
}


@pytest.mark.parametrize("layout", ["ep2_fsdp2", "ep4_chunks", "ep4_fixed", "ep2_fsdp1_4", "ep4_ulysses2"])
@pytest.mark.parametrize("choice", list(CHOICES))
def test_experts_without_a_token_get_zero_gradients(choice, layout, tmp_path):
    weights = biased(tmp_path, CHOICES[choice])
    expected = oracle("deepseek_v3", weights=weights)
    dead = slice(2, 4) if choice == "all_to_one_rank" else slice(0, 2)
    for outcome in run_ranks(one_step, EXPERT_LAYOUTS[layout][0], "deepseek_v3", layout, init=False, weights=weights):
        check(outcome, expected, BOUNDS["fp64"])
        experts = {name: grad for name, grad in outcome.gradients.items() if ".experts." in name}
        assert experts
        assert all(not grad[dead].any() and grad.any() for grad in experts.values())


def skip_experts_without_rows(run, module, rows, offsets, backend):
    return run(module, rows, offsets, backend) if int(offsets[-1]) else rows * 0


def test_experts_that_are_skipped_without_a_token_are_noticed(tmp_path):
    weights = biased(tmp_path, CHOICES["all_to_one_rank"])
    expected = oracle("deepseek_v3", weights=weights)

    def check_all() -> None:
        for outcome in run_ranks(one_step, 2, "deepseek_v3", "ep2_fsdp2", init=False, weights=weights):
            check(outcome, expected, BOUNDS["fp64"])

    check_all()
    with replaced(seams.EXPERT_ROWS, skip_experts_without_rows), pytest.raises(AssertionError):
        check_all()  # the gradients are not equal, or the ranks do not even gather the same ones


# ---------------------------------------------------------------- after three steps


def three_steps(layout: str, optimizer: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    launcher = Launcher(EXPERT_LAYOUTS[layout][1](), accelerator="cpu", precision="fp64", timeout_seconds=60)
    launcher.launch()
    model = launcher.setup_model(build_model(tiny_config("qwen3_moe"), weights="random")).train()
    factory, options = OPTIMIZERS[optimizer]
    updates = launcher.setup_optimizer(model, factory, **options)
    rows, place = global_rows(vocabulary("qwen3_moe")), launcher.data_parallel
    norms = []
    for batch in launcher.track([share(rows, place.rank, place.size, 3)] * 3):
        for micro in launcher.accumulate(model, batch):
            launcher.backward(model(**micro.inputs).loss, micro)
        norms.append(launcher.clip_grad_norm(model, 0.5).item())
        updates.step()
        updates.zero_grad()
    found = whole_parameters(model)
    launcher.close()
    return found, norms


def whole_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    def collect() -> dict[str, torch.Tensor]:
        return {
            name.replace("_fsdp_wrapped_module.", ""): (
                parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach().clone()
            )
            for name, parameter in model.named_parameters()
        }

    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return collect()
    return collect()


@functools.cache
def expected_after_three_steps(optimizer: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Plain PyTorch, one process, every document by itself; decay as setup_optimizer's rule has it."""
    model = initial_model(tiny_config("qwen3_moe"), "cpu")
    factory, options = OPTIMIZERS[optimizer]
    decay = options.get("weight_decay", 0.0)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    updates = factory(groups, **options)
    norms = []
    for _ in range(3):
        norms.append(backward_of(model, global_rows(vocabulary("qwen3_moe"))).grad_norm)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        updates.step()
        updates.zero_grad()
    return dict(model.named_parameters()), norms


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize(
    "layout", ["ep2_fsdp2_4", "ep4_chunks", "ep2_hsdp", "ep2_fsdp1", "ep2_fsdp1_4", "ep4_ulysses2"]
)
def test_parameters_after_three_steps(layout, optimizer):
    expected, norms = expected_after_three_steps(optimizer)
    for found, seen in run_ranks(three_steps, EXPERT_LAYOUTS[layout][0], layout, optimizer, init=False):
        assert found.keys() == expected.keys()
        for name, parameter in expected.items():
            assert (found[name] - parameter).norm() <= 1e-11 * parameter.norm(), name
        torch.testing.assert_close(torch.tensor(seen), torch.tensor(norms), rtol=1e-11, atol=0)
