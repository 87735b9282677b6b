"""Break the code on purpose, one classic way at a time: the parity check must notice every one.

Each bug is one that a training library really had (research/veomni-feature-map.md 3, reliability-and-security.md 5).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.harness import run_ranks
from tests.parity.layouts import EXPERT_LAYOUTS, LAYOUTS, check, one_step
from tests.parity.test_strategies import truth
from veomni.launcher import Launcher

BUGS: dict[str, tuple[str, str, Callable[[Launcher], None]]] = {}


def bug(layout: str, model: str = "qwen3") -> Callable[[Callable[[Launcher], None]], Callable[[Launcher], None]]:
    def enter(function: Callable[[Launcher], None]) -> Callable[[Launcher], None]:
        BUGS[function.__name__] = layout, model, function
        return function

    return enter


@bug("ddp2")
def gradient_doubled(launcher):
    backward = launcher.backward
    launcher.backward = lambda loss, micro: backward(loss * 2, micro)


@bug("fsdp2_2")
def mean_of_micro_batch_means(launcher):
    def backward(loss, micro):
        launcher._batch.loss = launcher._batch.loss + loss.detach() / 6
        (loss / 3).backward()

    launcher.backward = backward


@bug("ddp2")
def tokens_counted_on_one_rank_only(launcher):
    import veomni.launcher as module

    agree = module.agree
    module.agree = lambda **mine: agree(**{**mine, "loss_weight": mine["loss_weight"] if launcher.rank == 0 else 0})


@bug("fsdp2_2")
def average_not_undone(launcher):
    size = launcher.state.size
    launcher.state.size = lambda axis: 1 if axis == "loss" else size(axis)


@bug("single")
def label_shift_lost(launcher):
    import veomni.models.adapter.passes.token_loss as module

    module.F.pad = lambda labels, *args, **kwargs: torch.cat([labels[..., :1], labels], dim=-1)


@bug("fsdp1_full")
def first_label_of_a_document_trained(launcher):
    accumulate = launcher.accumulate

    def leaky(model, batch):
        for micro in batch.micro_batches:
            starts = micro["position_ids"] == 0
            micro["labels"][starts] = micro["input_ids"][starts]
        return accumulate(model, batch)

    launcher.accumulate = leaky


@bug("single")
def documents_not_isolated(launcher):
    accumulate = launcher.accumulate

    def mixed(model, batch):
        for micro in batch.micro_batches:
            micro["position_ids"] = torch.arange(micro["input_ids"].shape[1]).expand_as(micro["input_ids"])
        return accumulate(model, batch)

    launcher.accumulate = mixed


@bug("ddp2")
def ddp_gradients_never_synchronised(launcher):
    grad_sync = launcher.parameter_strategy.grad_sync
    launcher.parameter_strategy.grad_sync = lambda model, last: grad_sync(model, False)


@bug("ddp2")
def earlier_micro_batches_forgotten(launcher):
    accumulate = launcher.accumulate

    def forgetful(model, batch):
        for micro in accumulate(model, batch):
            model.zero_grad()
            yield micro

    launcher.accumulate = forgetful


@bug("fsdp2_2")
def norm_of_own_shard_only(launcher):
    from veomni.strategies import fsdp2

    fsdp2.sharded_grad_norm = lambda parameters, device: torch.stack(
        [p.grad.to_local().norm() for p in parameters if p.grad is not None]
    ).norm()


@bug("hsdp_2x2")
def norm_counts_replicas(launcher):
    norm = launcher.parameter_strategy.grad_norm

    def counted_twice(model):
        total = norm(model).square()
        dist.all_reduce(total, group=launcher.state.group("dp_replicate"))
        return total.sqrt()

    launcher.parameter_strategy.grad_norm = counted_twice


@bug("fsdp1_full")
def weights_differ_between_ranks(launcher):
    launcher.seed += launcher.rank


@bug("single")
def padding_counted_as_tokens(launcher):
    import veomni.launcher as module

    module.loss_weight = lambda inputs: int(inputs["input_ids"].numel())


@bug("ddp2")
def masked_row_counts_as_a_mean(launcher):
    """A micro-batch without labels weighs like the others: the global mean becomes a mean over micro-batches."""
    import veomni.launcher as module

    count = module.loss_weight
    module.loss_weight = lambda inputs: max(1, count(inputs)) + 1


@bug("fsdp2_2")
def same_rows_on_every_rank(launcher):
    from veomni.launcher import DataParallel

    Launcher.data_parallel = property(lambda self: DataParallel(0, 2))


@bug("fsdp2_2")
def loss_not_reduced(launcher):
    launcher.global_loss = lambda batch: batch.loss


@bug("ep2_fsdp2_4", "qwen3_moe")
def expert_gradient_divided_by_its_copies_only(launcher):
    """The classic: the average over the ranks that hold an expert is ``ep`` times too large."""
    from veomni.strategies import expert_parallel

    average_over = expert_parallel._average_over
    expert_parallel._average_over = lambda module, ranks: average_over(module, ranks // 2)


@bug("ep2_fsdp1", "qwen3_moe")
def norms_of_two_meshes_added(launcher):
    from veomni.strategies import fsdp1

    def of_each_mesh(model):
        own = [p.grad for p in model.parameters() if p.grad is not None and not isinstance(p, fsdp1.DTensor)]
        rest = torch.stack([grad.norm() for grad in own if grad.numel()]).square().sum()
        dist.all_reduce(rest)
        experts = [p for p in model.parameters() if isinstance(p, fsdp1.DTensor)]
        return rest.sqrt() + fsdp1.sharded_grad_norm(experts, torch.device("cpu"))

    launcher.parameter_strategy.grad_norm = of_each_mesh


@bug("ep2_hsdp", "qwen3_moe")
def norm_of_experts_on_one_mesh_axis_only(launcher):
    from veomni.strategies import grad_norm

    sharding = grad_norm._sharding
    grad_norm._sharding = lambda parameter: (sharding(parameter)[0], sharding(parameter)[1][:1])


def combine_otherwise(launcher, spoil):
    """Spoil what comes home to a rank, once the model has been set up: the trial runs of the set-up would notice."""
    from veomni.ops.experts import exchange as expert_exchange

    accumulate, combine = launcher.accumulate, expert_exchange.combine_rows

    def spoiled(model, batch):
        expert_exchange.combine_rows = lambda rows, routing, weights: combine(spoil(rows, routing), routing, weights)
        return accumulate(model, batch)

    launcher.accumulate = spoiled


@bug("ep4_chunks", "qwen3_moe")
def tokens_beyond_a_capacity_dropped(launcher):
    def within_capacity(rows, routing):
        expert = torch.repeat_interleave(torch.arange(len(routing.counts)), routing.counts)
        place = torch.arange(len(rows)) - (routing.offsets - routing.counts)[expert]
        return rows * (place < routing.counts.max() - 1)[:, None]

    combine_otherwise(launcher, within_capacity)


@bug("ep2_fsdp2", "qwen3_moe")
def rows_given_back_to_the_wrong_tokens(launcher):
    combine_otherwise(launcher, lambda rows, routing: rows.roll(1, 0))


def break_it(name: str, launcher: Launcher) -> None:
    BUGS[name][2](launcher)


def ranks_of(layout: str) -> int:
    return (LAYOUTS | EXPERT_LAYOUTS)[layout][0]


def outcomes(name: str):
    layout, model, _ = BUGS[name]
    return run_ranks(
        one_step, ranks_of(layout), model, layout, init=False, accumulation=3, mutate=lambda it: break_it(name, it)
    )


def check_all(found, model):
    for outcome in found:
        check(outcome, truth(model), 1e-12)


def test_there_are_enough_bugs():
    assert len(BUGS) >= 12


@pytest.mark.parametrize("name", list(BUGS))
def test_bug_is_caught(name):
    found = outcomes(name)
    with pytest.raises(AssertionError):
        check_all(found, BUGS[name][1])


@pytest.mark.parametrize(("layout", "model"), sorted({(layout, model) for layout, model, _ in BUGS.values()}))
def test_the_same_run_without_a_bug_passes(layout, model):
    found = run_ranks(one_step, ranks_of(layout), model, layout, init=False, accumulation=3)
    check_all(found, model)
