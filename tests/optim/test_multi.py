"""Several optimizers behind one: steps, states, hooks, schedules, and which parameters are put together."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ConstantLR, LambdaLR

from tests.optim.layouts import LAYOUTS, give_gradients, laid_out, new_model, values
from veomni.errors import CheckpointError, ModelError
from veomni.launcher import Launcher
from veomni.optim import MultiLRScheduler, MultiOptimizer, build_optimizer, build_scheduler
from veomni.testing.ranks import run_ranks


def halves(model: nn.Module) -> list[list[nn.Parameter]]:
    parameters = list(model.parameters())
    return [parameters[::2], parameters[1::2]]


def split(model: nn.Module, lr: float = 0.1) -> MultiOptimizer:
    first, second = halves(model)
    return MultiOptimizer({"first": AdamW(first, lr=lr), "second": AdamW(second, lr=lr)})


def undivided(model: nn.Module, lr: float = 0.1) -> AdamW:
    return AdamW([{"params": part} for part in halves(model)], lr=lr)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, indices=range(3), scheduler=None) -> None:
    for step in indices:
        give_gradients(model, step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def assert_same(left: nn.Module, right: nn.Module) -> None:
    for (name, one), other in zip(values(left).items(), values(right).values(), strict=True):
        assert torch.equal(one, other), name


def test_it_steps_as_one_optimizer_over_all_groups_would():
    one, other = new_model(), new_model()
    steps(one, split(one))
    steps(other, undivided(other))
    assert_same(one, other)


@pytest.mark.parametrize(("save", "load"), [(split, undivided), (undivided, split), (split, split)])
def test_its_state_is_that_of_one_optimizer(save, load):
    one, other = new_model(), new_model()
    saved = save(one)
    steps(one, saved)
    loaded = load(other, lr=7.0)
    other.load_state_dict(one.state_dict())
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))  # PyTorch would share the tensors
    assert loaded.param_groups[0]["lr"] == 0.1
    steps(one, saved, [3])
    steps(other, loaded, [3])
    assert_same(one, other)


def test_a_state_of_other_groups_is_rejected():
    model = new_model()
    with pytest.raises(CheckpointError, match="groups of"):
        split(model).load_state_dict(AdamW(model.parameters()).state_dict())


def test_groups_are_the_members_own_also_after_loading():
    model = new_model()
    optimizer = split(model)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.members["second"].load_state_dict(optimizer.members["second"].state_dict())
    optimizer.param_groups[1]["lr"] = 0.0
    before = values(model)
    steps(model, optimizer, [0])
    still = {id(parameter) for parameter in halves(model)[1]}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is (id(parameter) in still), name


def test_gradients_are_forgotten_or_zeroed():
    model = new_model()
    optimizer = split(model)
    give_gradients(model, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(not parameter.grad.any() for parameter in model.parameters())
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_and_closures_run_once_a_step():
    model = new_model()
    optimizer, calls = split(model), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        assert torch.is_grad_enabled()
        calls.append("closure")
        give_gradients(model, 0)
        return 3.0

    assert optimizer.step(closure) == 3.0
    assert calls == ["before", "closure", "after"]


def test_shared_parameters_and_strange_groups_are_rejected():
    model = new_model()
    with pytest.raises(ModelError, match="share parameters"):
        MultiOptimizer({"one": SGD(model.parameters()), "two": SGD(model.head.parameters())})
    with pytest.raises(ModelError, match="share parameters, or have none"):
        MultiOptimizer({})
    with pytest.raises(ModelError, match="no groups of its own"):
        split(model).add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def test_a_schedule_of_pytorch_drives_all_members():
    one, other = new_model(), new_model()
    made, reference = split(one), undivided(other)
    steps(one, made, scheduler=LambdaLR(made, lambda step: 1 / (1 + step)))
    steps(other, reference, scheduler=LambdaLR(reference, lambda step: 1 / (1 + step)))
    assert_same(one, other)


def two_schedules(optimizer: MultiOptimizer) -> MultiLRScheduler:
    first, second = optimizer.members.values()
    linear = build_scheduler(first, "linear", total_steps=10, warmup_steps=2)
    return MultiLRScheduler({"first": linear, "second": ConstantLR(second, factor=0.5, total_iters=2)})


def test_members_can_have_schedules_of_their_own_and_these_resume():
    model = new_model()
    optimizer = split(model)
    scheduler, found = two_schedules(optimizer), []
    for step in range(4):
        if step == 2:
            kept = optimizer.state_dict(), scheduler.state_dict()
            optimizer = split(model, lr=5.0)
            scheduler = two_schedules(optimizer)
            optimizer.load_state_dict(kept[0])
            scheduler.load_state_dict(kept[1])
        found.append(scheduler.get_last_lr())
        assert [group["lr"] for group in optimizer.param_groups] == found[-1]
        steps(model, optimizer, [step], scheduler)
    peak = 0.1
    assert found == [pytest.approx([peak / 3, peak / 2]), pytest.approx([2 * peak / 3, peak / 2]),
                     pytest.approx([peak, peak]), pytest.approx([peak * 7 / 8, peak])]  # fmt: skip


def test_schedules_of_other_names_are_rejected():
    optimizer = split(new_model())
    scheduler = two_schedules(optimizer)
    with pytest.raises(CheckpointError, match="of schedules first, this run has first, second"):
        scheduler.load_state_dict({"first": {}})


@pytest.mark.parametrize(("total", "groups"), [(1, 2), (2, 4)])
def test_the_state_of_a_schedule_fits_any_number_of_groups(total, groups):
    model = new_model()
    parameters = list(model.parameters())
    many = AdamW([{"params": parameters[i::groups], "lr": 0.5} for i in range(groups)])
    few = AdamW([{"params": parameters[i::total], "lr": 0.5} for i in range(total)])
    shape = {"name": "cosine", "total_steps": 9, "warmup_steps": 2, "min_lr_ratio": 0.1}
    saved, loaded = build_scheduler(many, **shape), build_scheduler(few, **shape)
    steps(model, many, range(5), saved)
    loaded.load_state_dict(saved.state_dict())
    steps(model, many, [5], saved)
    steps(model, few, [5], loaded)
    assert set(loaded.get_last_lr()) == set(saved.get_last_lr())


def members_on(layout: str, name: str) -> dict[str, tuple[list[int], bool]]:
    optimizer = build_optimizer(laid_out(layout), name, lr=0.1, no_decay=())
    members = optimizer.members if isinstance(optimizer, MultiOptimizer) else {"": optimizer}
    return {
        key: ([len(group["params"]) for group in member.param_groups], bool(member.param_groups[0].get("fused")))
        for key, member in members.items()
    }


# Two layers: two matrices, a norm's weight and bias and a bias each, beside embedding and head; two stacks and a bias.
DENSE, EXPERTS = [6, 6], [4, 2]


@pytest.mark.parametrize(
    ("layout", "name", "expected"),
    [
        ("fsdp2_2", "adamw", {"": ([10, 8], True)}),
        ("ep2", "adamw", {"fsdp": (DENSE, True), "ep_fsdp.ep": (EXPERTS, True)}),
        ("hsdp_ep2", "adamw", {"dp_replicate.fsdp": (DENSE, True), "dp_replicate.ep_fsdp.ep": (EXPERTS, True)}),
        ("ep2", "sgd", {"fsdp": (DENSE, False), "ep_fsdp.ep": (EXPERTS, False)}),
        (
            "ep2",
            "muon",
            {"muon.fsdp": ([4], False), "muon.ep_fsdp.ep": ([4], False), "adamw.fsdp": ([2, 6], True),
             "adamw.ep_fsdp.ep": ([2], True)},
        ),
        ("single", "muon", {"muon.unsharded": ([8], False), "adamw.unsharded": ([2, 8], True)}),
    ],
)  # fmt: skip
def test_every_mesh_has_a_member_with_groups_of_its_own(layout, name, expected):
    for found in run_ranks(members_on, LAYOUTS[layout], layout, name):
        assert found == expected


def by_launcher(layout: str) -> tuple[list[str], dict[str, torch.Tensor]]:
    model = laid_out(layout)
    optimizer = Launcher.setup_optimizer(
        Launcher(accelerator="cpu"), model, AdamW, lr=0.1, weight_decay=0.3, no_decay=["head"]
    )
    steps(model, optimizer)
    return list(getattr(optimizer, "members", {})), values(model)


@pytest.mark.parametrize(("layout", "members"), [("fsdp2_2", []), ("ep2_fsdp2", ["fsdp", "ep_fsdp.ep"]), ("ddp", [])])
def test_the_launcher_gives_every_mesh_an_optimizer_of_the_users(layout, members):
    _, truth = by_launcher("single")
    for found, trained in run_ranks(by_launcher, LAYOUTS[layout], layout):
        assert sorted(found) == sorted(members)
        for name, expected in truth.items():
            torch.testing.assert_close(trained[name], expected, rtol=1e-12, atol=1e-14)
