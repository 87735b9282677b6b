"""Experts spread over ranks: choices that leave some without a token, and the same parameters after three steps."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from tests.models.tiny import tiny_config
from tests.parity.layouts import EXPERT_LAYOUTS, one_step, oracle, vocabulary
from tests.together import Job
from veomni.launcher import Launcher
from veomni.models import Materializer, build_model
from veomni.testing import seams
from veomni.testing.documents import global_rows, share
from veomni.testing.oracle import BOUNDS, Truth, backward_of, check, initial_model
from veomni.testing.ranks import run_ranks
from veomni.testing.seams import replaced
from veomni.testing.step import Outcome

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, float]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.5}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}


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


@functools.cache
def favouring(choice: str) -> tuple[str, Truth]:
    """A directory with weights, and the true step with them."""
    weights = biased(Path(tempfile.mkdtemp()), CHOICES[choice])
    return weights, oracle("deepseek_v3", weights=weights)


def step_with(choice: str, layout: str) -> Outcome:
    return one_step("deepseek_v3", layout, weights=favouring(choice)[0])


UNEVEN = [
    Job(EXPERT_LAYOUTS[layout][0], step_with, (choice, layout))
    for layout in ("ep2_fsdp2", "ep4_chunks", "ep4_fixed", "ep2_fsdp1_4", "ep4_ulysses2")
    for choice in CHOICES
]


@pytest.fixture(scope="module")
def _written():
    for choice in CHOICES:
        favouring(choice)  # before the ranks are forked


@pytest.mark.usefixtures("_written")
@pytest.mark.parametrize("case", UNEVEN, ids=str)
def test_experts_without_a_token_get_zero_gradients(case, outcomes):
    choice, _ = case.given
    dead = slice(2, 4) if choice == "all_to_one_rank" else slice(0, 2)
    for outcome in outcomes(case):
        check(outcome, favouring(choice)[1], BOUNDS["fp64"])
        experts = {name: grad for name, grad in outcome.gradients.items() if ".experts." in name}
        assert experts
        assert all(not grad[dead].any() and grad.any() for grad in experts.values())


def skip_experts_without_rows(run, module, hidden, rows, *args, **options):
    return run(module, hidden, rows, *args, **options) if int(rows.offsets[-1]) else hidden * 0


def test_experts_that_are_skipped_without_a_token_are_noticed():
    choice, layout = UNEVEN[0].given
    _, expected = favouring(choice)

    def check_all() -> None:
        for outcome in run_ranks(step_with, 2, choice, layout, init=False):
            check(outcome, expected, BOUNDS["fp64"])

    with replaced(seams.EXPERTS, skip_experts_without_rows), pytest.raises(AssertionError):
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


STEPS = [
    Job(EXPERT_LAYOUTS[layout][0], three_steps, (layout, optimizer))
    for layout, optimizer in [
        *((layout, "adamw") for layout in ("ep2_fsdp2_4", "ep4_chunks", "ep2_hsdp", "ep2_fsdp1", "ep4_ulysses2")),
        *((layout, "sgd") for layout in ("ep2_fsdp2_4", "ep2_fsdp1_4")),
    ]
]


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_parameters_after_three_steps(case, outcomes):
    expected, norms = expected_after_three_steps(case.given[1])
    for found, seen in outcomes(case):
        assert found.keys() == expected.keys()
        for name, parameter in expected.items():
            assert (found[name] - parameter).norm() <= 1e-11 * parameter.norm(), name
        torch.testing.assert_close(torch.tensor(seen), torch.tensor(norms), rtol=1e-11, atol=0)
