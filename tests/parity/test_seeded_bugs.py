"""Break the code on purpose, one classic way at a time: the parity check must notice every one.

Each bug is one that a training library really had (research/veomni-feature-map.md 3, reliability-and-security.md 5).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.harness import run_ranks
from tests.parity.layouts import LAYOUTS, check, one_step
from tests.parity.test_strategies import truth
from veomni.launcher import Launcher

BUGS: dict[str, tuple[str, Callable[[Launcher], None]]] = {}


def bug(layout: str) -> Callable[[Callable[[Launcher], None]], Callable[[Launcher], None]]:
    def enter(function: Callable[[Launcher], None]) -> Callable[[Launcher], None]:
        BUGS[function.__name__] = layout, function
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
    module.agree = lambda **mine: agree(**{**mine, "tokens": mine["tokens"] if launcher.rank == 0 else 0})


@bug("fsdp2_2")
def average_not_undone(launcher):
    size = launcher.state.size
    launcher.state.size = lambda axis: 1 if axis == "loss" else size(axis)


@bug("single")
def label_shift_lost(launcher):
    import veomni.models.token_loss as module

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

    module.supervised_tokens = lambda inputs: int(inputs["input_ids"].numel())


@bug("ddp2")
def masked_row_counts_as_a_mean(launcher):
    """A micro-batch without labels weighs like the others: the global mean becomes a mean over micro-batches."""
    import veomni.launcher as module

    count = module.supervised_tokens
    module.supervised_tokens = lambda inputs: max(1, count(inputs)) + 1


@bug("fsdp2_2")
def same_rows_on_every_rank(launcher):
    from veomni.launcher import DataParallel

    Launcher.data_parallel = property(lambda self: DataParallel(0, 2))


@bug("fsdp2_2")
def loss_not_reduced(launcher):
    launcher.global_loss = lambda batch: batch.loss


def break_it(name: str, launcher: Launcher) -> None:
    BUGS[name][1](launcher)


def outcomes(name: str):
    layout = BUGS[name][0]
    return run_ranks(
        one_step, LAYOUTS[layout][0], "qwen3", layout, init=False, accumulation=3, mutate=lambda it: break_it(name, it)
    )


def check_all(found):
    for outcome in found:
        check(outcome, truth("qwen3"), 1e-12)


def test_there_are_enough_bugs():
    assert len(BUGS) >= 12


@pytest.mark.parametrize("name", list(BUGS))
def test_bug_is_caught(name):
    found = outcomes(name)
    with pytest.raises(AssertionError):
        check_all(found)


@pytest.mark.parametrize("layout", sorted({layout for layout, _ in BUGS.values()}))
def test_the_same_run_without_a_bug_passes(layout):
    found = run_ranks(one_step, LAYOUTS[layout][0], "qwen3", layout, init=False, accumulation=3)
    check_all(found)
