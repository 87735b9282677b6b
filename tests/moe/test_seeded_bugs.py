"""Break the routers' bookkeeping on purpose, one classic way at a time: the checks must notice every one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.moe.steps import AUX, Z, balanced_step
from tests.moe.test_balance import OPTIONS, agrees, truth
from tests.moe.test_bias import RATE, moved, steps
from tests.moe.test_load import truth as load_truth
from tests.parity.layouts import LAYOUTS
from veomni.testing import seams
from veomni.testing.ranks import run_ranks
from veomni.testing.seams import replaced


def balanced_over_own_tokens_only(reduce, load, group):
    """Every rank compares experts over the tokens it has."""


def padding_counted(token_mask, inputs, rows):
    return None


def padded_tail_of_a_split_row_counted(token_mask, inputs, rows):
    return None if dist.get_rank() == 1 else token_mask(inputs, rows)


def average_over_ranks_not_undone(gradient, *args):
    return gradient(*args) / dist.get_world_size()


def gradient_scaled_with_the_micro_batch(gradient, *args):
    return gradient(*args) / 3


def counts_of_the_last_micro_batch_only(counts_first, controller):
    return False


BUGS = [
    (seams.EXPERT_LOAD, balanced_over_own_tokens_only, "ddp2", {}),
    (seams.EXPERT_LOAD, balanced_over_own_tokens_only, "ulysses2_fsdp2", {}),
    (seams.TOKEN_MASK, padding_counted, "single", {}),
    (seams.TOKEN_MASK, padding_counted, "fsdp2_2", {}),
    (seams.TOKEN_MASK, padded_tail_of_a_split_row_counted, "ulysses2_ddp", {}),
    (seams.ROUTER_GRADIENT, average_over_ranks_not_undone, "fsdp1_full", {}),
    (seams.ROUTER_GRADIENT, gradient_scaled_with_the_micro_batch, "single", {"accumulation": 3}),
    (seams.ROUTERS_COUNT_FIRST, counts_of_the_last_micro_batch_only, "single", {"accumulation": 3}),
]


@pytest.mark.parametrize(("seam", "bug", "layout", "options"), BUGS)
def test_a_wrong_gradient_is_noticed(seam, bug, layout, options):
    known, numbers = truth("qwen3_moe", AUX, Z)
    with replaced(seam, bug):
        results = run_ranks(balanced_step, LAYOUTS[layout][0], "qwen3_moe", layout, OPTIONS, init=False, **options)
    with pytest.raises(AssertionError, match="gradients off"):
        agrees(results, (known, numbers))


def bias_moved_with_every_micro_batch(see, controller, router, routing, training):
    see(controller, router, routing, training)
    if training:
        load = torch.bincount(routing.indices.flatten(), minlength=router.experts)
        dist.all_reduce(load)
        router.move_bias(load, RATE)


def bias_moved_by_own_load(reduce, load, group):
    """Every rank compares the experts over the tokens it has."""


WRONG_BIASES = [
    (seams.ROUTER_DECISIONS, bias_moved_with_every_micro_batch),
    (seams.EXPERT_LOAD, bias_moved_by_own_load),
]


@pytest.mark.parametrize(("seam", "bug"), WRONG_BIASES)
def test_a_wrong_bias_is_noticed(seam, bug):
    (right,) = run_ranks(steps, 1, "deepseek_v3", "single", 4, 3, init=False)
    assert right[1] == moved(load_truth("deepseek_v3"))
    with replaced(seam, bug):
        found = run_ranks(steps, 4, "deepseek_v3", "fsdp2_4", 4, 3, None, init=False)
    assert any(after != right for after in found)
