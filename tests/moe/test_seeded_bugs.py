"""Break the routers' bookkeeping on purpose, one classic way at a time: the checks must notice every one."""

from __future__ import annotations

import pytest

from tests.harness import run_ranks
from tests.moe.steps import AUX, Z, balanced_step
from tests.moe.test_balance import OPTIONS, agrees, truth
from tests.moe.test_bias import RATE, moved, steps
from tests.moe.test_load import truth as load_truth
from tests.parity.layouts import LAYOUTS


def balanced_over_own_tokens_only(launcher, model):
    from veomni.moe.load import LoadCounter

    LoadCounter.reduce = lambda self, group: None


def padding_counted(launcher, model):
    import veomni.moe.controller as module

    module.token_mask = lambda inputs, part: None


def padded_tail_of_a_split_row_counted(launcher, model):
    import veomni.moe.controller as module

    token_mask = module.token_mask
    module.token_mask = lambda inputs, part: None if launcher.rank == 1 else token_mask(inputs, part)


def average_over_ranks_not_undone(launcher, model):
    controller = launcher._controllers[model]
    gradient = controller.gradient
    controller.gradient = lambda *args: gradient(*args) / launcher.world_size


def gradient_scaled_with_the_micro_batch(launcher, model):
    controller = launcher._controllers[model]
    gradient = controller.gradient
    controller.gradient = lambda *args: gradient(*args) / 3


def counts_of_the_last_micro_batch_only(launcher, model):
    controller = launcher._controllers[model]
    controller.__class__.counts_first = False


BUGS = [
    (balanced_over_own_tokens_only, "ddp2", {}),
    (balanced_over_own_tokens_only, "ulysses2_fsdp2", {}),
    (padding_counted, "single", {}),
    (padding_counted, "fsdp2_2", {}),
    (padded_tail_of_a_split_row_counted, "ulysses2_ddp", {}),
    (average_over_ranks_not_undone, "fsdp1_full", {}),
    (gradient_scaled_with_the_micro_batch, "single", {"accumulation": 3}),
    (counts_of_the_last_micro_batch_only, "single", {"accumulation": 3}),
]


@pytest.mark.parametrize(("bug", "layout", "options"), BUGS)
def test_a_wrong_gradient_is_noticed(bug, layout, options):
    results = run_ranks(
        balanced_step, LAYOUTS[layout][0], "qwen3_moe", layout, OPTIONS, init=False, mutate=bug, **options
    )
    known, numbers = truth("qwen3_moe", AUX, Z)
    with pytest.raises(AssertionError, match="gradients off"):
        agrees(results, (known, numbers))


def bias_moved_with_every_micro_batch(launcher):
    from veomni.moe.bias import move_bias
    from veomni.moe.controller import RouterController

    before_backward = RouterController.before_backward

    def impatient(self):
        before_backward(self)
        for router, sent in zip(self.routers, self._micro.by_router(), strict=True):
            move_bias(router, sent, RATE)

    RouterController.before_backward = impatient


def bias_moved_by_own_load(launcher):
    from veomni.moe.load import LoadCounter

    LoadCounter.reduce = lambda self, group: None


@pytest.mark.parametrize("bug", [bias_moved_with_every_micro_batch, bias_moved_by_own_load])
def test_a_wrong_bias_is_noticed(bug):
    (right,) = run_ranks(steps, 1, "deepseek_v3", "single", 4, 3, init=False)
    assert right[1] == moved(load_truth("deepseek_v3"))
    assert any(after != right for after in run_ranks(steps, 4, "deepseek_v3", "fsdp2_4", 4, 3, None, bug, init=False))
