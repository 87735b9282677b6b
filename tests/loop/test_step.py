"""A step: two models in one loop, what a loop must not leave out, and that only losses decide gradients."""

from __future__ import annotations

import functools
import re
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.models.tiny import tiny_config
from veomni.batch.micro_batch import MicroBatch
from veomni.errors import CheckpointError, DataError, LoopError, ModelError, NonFiniteError, VeOmniError
from veomni.launcher import Launcher
from veomni.loop.checkpoint_schedule import CheckpointSchedule
from veomni.loop.reporter import Reporter
from veomni.loop.step_reader import listed
from veomni.metrics import StepFlops
from veomni.models import build_model
from veomni.moe import MoEOptions
from veomni.strategies import FSDP2
from veomni.testing.documents import global_rows, share
from veomni.testing.ranks import RankFailed, run_cases, run_ranks
from veomni.testing.step import full_gradients

ROUTER = MoEOptions(aux_loss_coef=0.3, z_loss_coef=0.02)


def moe_model(launcher, seed):
    model = build_model(tiny_config("qwen3_moe", num_experts=4 + 2 * seed), weights="random")
    return launcher.setup_model(model, router=ROUTER).train()


def step_of(launcher, models, interleaved):
    """Gradients of a step with three micro-batches, for each model: interleaved, or one model after the other."""
    place = launcher.data_parallel
    losses, gradients = [], []
    for step in launcher.track([share(global_rows(128), place.rank, place.size, 3)]):
        if interleaved:
            for micros in zip(*(launcher.accumulate(model, step) for model in models), strict=False):
                for model, micro in zip(models, micros, strict=True):
                    launcher.backward(model(**micro.inputs).loss, micro)
        else:
            for model in models:
                for micro in launcher.accumulate(model, step):
                    launcher.backward(model(**micro.inputs).loss, micro)
        losses = [launcher.global_loss(step, model).item() for model in models]
        for model in models:
            launcher.clip_grad_norm(model, 1e9)
        launcher.log({})
        gradients = [full_gradients(model) for model in models]
    return losses, gradients


def models_together(together):
    launcher = Launcher(FSDP2(), accelerator="cpu", precision="fp64", backend="gloo")
    launcher.launch()
    models = [moe_model(launcher, 0), moe_model(launcher, 1)]
    found = step_of(launcher, models, together)
    launcher.close()
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_models_with_routers_interleaved_in_one_loop(ranks):
    together, apart = ([run_ranks(models_together, ranks, mode, init=False)] for mode in (True, False))
    for (losses, gradients), (expected, truth) in zip(together[0], apart[0], strict=True):
        assert losses == expected
        for own, other in zip(gradients, truth, strict=True):
            assert own.keys() == other.keys()
            assert all(torch.equal(own[name], other[name]) for name in own)
            assert any(own[name].any() for name in own if "gate" in name)


class Doubled(Reporter):
    """A reporter that reports what is not so."""

    def measure(self, micro_batches):
        causal, full = super().measure(micro_batches)
        return StepFlops(2 * causal + 1, 2 * full + 1)


def reported(reporter):
    launcher = Launcher("single", accelerator="cpu", precision="fp64", reporter=reporter())
    launcher.launch()
    found = step_of(launcher, [moe_model(launcher, 0)], False)
    launcher.close()
    return found


def test_a_reporter_changes_no_gradient():
    ((losses, (gradients,)),) = run_ranks(reported, 1, Doubled, init=False)
    ((expected, (truth,)),) = run_ranks(reported, 1, Reporter, init=False)
    assert losses == expected
    assert all(torch.equal(gradients[name], truth[name]) for name in truth)


# ---------------------------------------------------------------- loops that cannot be right


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return self.linear(x)


def loop(body, steps=2):
    strategy = {module_without_set_up: "fsdp2", module_inside_its_wrapper: "ddp"}.get(body, "single")
    launcher = Launcher(strategy, accelerator="cpu", devices=1)
    launcher.launch()
    model = launcher.setup_model(Plain())
    for step in launcher.track([[torch.ones(3, 2)[None].unbind(0), {"x": torch.ones(1, 2)}] * 2] * steps):
        body(launcher, model, step)


def loss_of(model, micro):
    return model(*micro.args, **micro.inputs).sum()


def left_by_break(launcher, model, step):
    for micro in launcher.accumulate(model, step):
        launcher.backward(loss_of(model, micro), micro)
        if micro.index == 1:
            break
    launcher.clip_grad_norm(model, 1.0)


def forgotten_backward(launcher, model, step):
    for micro in launcher.accumulate(model, step):
        if micro.index != 2:
            launcher.backward(loss_of(model, micro), micro)


def plain_backward(launcher, model, step):
    for micro in launcher.accumulate(model, step):
        loss_of(model, micro).backward()
    launcher.log({"loss": 0.0})


def iterated(launcher, model, step):
    for _ in step:
        pass


def no_loss(launcher, model, step):
    for micro in launcher.accumulate(model, step):
        launcher.backward(None, micro)


def unreduced_loss(launcher, model, step):
    for micro in launcher.accumulate(model, step):
        launcher.backward(model(*micro.args, **micro.inputs), micro)


def number_for_a_loss(launcher, model, step):
    for micro in launcher.accumulate(model, step):
        launcher.backward(loss_of(model, micro).item(), micro)


def foreign_micro_batch(launcher, model, step):
    launcher.backward(torch.ones(()), step.micro_batches[0])


def batch_for_a_step(launcher, model, step):
    next(launcher.accumulate(model, step.micro_batches))


def unknown_model(launcher, model, step):
    launcher.global_loss(step)


def unweighted(launcher, model, step):
    next(launcher.accumulate(model, step, weight=lambda micro: 0))


def module_without_set_up(launcher, model, step):
    next(launcher.accumulate(Plain(), step))


def module_inside_its_wrapper(launcher, model, step):
    next(launcher.accumulate(model.module, step))


def optimizers_in_a_list(launcher, model, step):
    launcher.checkpoints = CheckpointSchedule(Path(tempfile.mkdtemp()), save_steps=1)
    launcher.checkpoint({"model": model, "optimizer": [torch.optim.SGD(model.parameters())]})


def negative_weight(launcher, model, step):
    next(launcher.accumulate(model, step, weight=lambda micro: 3 if micro.args else -1))


def number_for_a_measure(launcher, model, step):
    launcher.evaluate(model, [step.micro_batches], loss=lambda model, micro: 1.0)


def unreduced_measure(launcher, model, step):
    launcher.evaluate(model, [step.micro_batches], loss=lambda model, micro: model(*micro.args, **micro.inputs))


def twice_accumulated(launcher, model, step):
    for _ in range(2):
        for micro in launcher.accumulate(model, step):
            launcher.backward(loss_of(model, micro), micro)


def second_backward(launcher, model, step):
    for micro in launcher.accumulate(model, step):
        for _ in range(2):
            launcher.backward(loss_of(model, micro), micro)


def nothing_accumulated(launcher, model, step):
    launcher.setup_optimizer(model, torch.optim.SGD, lr=0.1).step()


def clipped_without_accumulate(launcher, model, step):
    launcher.clip_grad_norm(model, 1.0)


def nonfinite(launcher, model, step):
    for micro in launcher.accumulate(model, step):
        launcher.backward(loss_of(model, micro) / torch.zeros(()), micro)


def nonfinite_parameters(launcher, model, step):
    launcher.checkpoints = CheckpointSchedule(Path(tempfile.mkdtemp()), save_steps=1)
    with torch.no_grad():
        model.linear.weight[0, 0] = torch.nan
    launcher.checkpoint({"model": model})


def empty_evaluation(launcher, model, step):
    launcher.evaluate(model, [], loss=lambda model, micro: loss_of(model, micro))


def negative_clip(launcher, model, step):
    for micro in launcher.accumulate(model, step):
        launcher.backward(loss_of(model, micro), micro)
    launcher.clip_grad_norm(model, -1.0)


def set_up_twice(launcher, model, step):
    launcher.setup_model(model)


BAD_LOOPS = {
    negative_clip: (LoopError, "was given max_norm -1.0"),
    set_up_twice: (ModelError, "called with this Plain before"),
    twice_accumulated: (LoopError, "step 1 was accumulated on Plain twice"),
    second_backward: (LoopError, "micro-batch 0 had a second launcher.backward"),
    nothing_accumulated: (LoopError, "no parameter has a gradient"),
    clipped_without_accumulate: (LoopError, "step 1 was accumulated on no model"),
    nonfinite: (NonFiniteError, "the loss of a step was not finite"),
    nonfinite_parameters: (NonFiniteError, r"model: linear.weight .* not finite"),
    empty_evaluation: (LoopError, "empty loader"),
    module_without_set_up: (LoopError, "Plain was not set up"),
    module_inside_its_wrapper: (LoopError, "Plain was not set up"),
    optimizers_in_a_list: (CheckpointError, "state..optimizer.. is a list"),
    left_by_break: (LoopError, "step 1: 2 of 4 micro-batches had no launcher.backward"),
    forgotten_backward: (LoopError, "step 1: 1 of 4 micro-batches had no launcher.backward"),
    plain_backward: (LoopError, "step 1: 4 of 4 micro-batches had no launcher.backward"),
    iterated: (LoopError, "launcher.accumulate"),
    no_loss: (ModelError, "Plain returned no loss"),
    unreduced_loss: (LoopError, r"a tensor of shape \[3, 2\] for a loss"),
    number_for_a_loss: (LoopError, "given float for a loss"),
    foreign_micro_batch: (LoopError, "of no step"),
    batch_for_a_step: (LoopError, "accumulate.. was given a list"),
    unknown_model: (LoopError, "no model"),
    unweighted: (LoopError, "sum to 0"),
    negative_weight: (LoopError, "sum to nan.*\n.*0 or more"),
    number_for_a_measure: (ModelError, "returned float"),
    unreduced_measure: (ModelError, r"returned \[3, 2\]"),
}


def outcome(body):
    try:
        loop(body)
    except VeOmniError as error:
        return type(error), f"{error}"
    return None


def test_loops_that_cannot_be_right_are_errors():
    bodies = list(BAD_LOOPS)
    cases = [functools.partial(outcome, body) for body in bodies]
    for body, (found,) in zip(bodies, run_cases(cases, 1, init=False), strict=True):
        kind, message = BAD_LOOPS[body]
        assert found is not None, body.__name__
        assert found[0] is kind, (body.__name__, found)
        assert re.search(message, found[1]), (body.__name__, found)


def uneven_evaluation():
    launcher = Launcher("fsdp2", accelerator="cpu", backend="gloo")
    launcher.launch()
    model = launcher.setup_model(Plain())
    held_out = [[{"x": torch.ones(1, 2)}] * (1 + launcher.rank)]
    with pytest.raises(LoopError, match=f"rank {launcher.rank} has {1 + launcher.rank} micro-batches in step 1"):
        launcher.evaluate(model, held_out, loss=lambda model, micro: loss_of(model, micro))
    launcher.close()


def uneven_steps():
    launcher = Launcher("fsdp2", accelerator="cpu", backend="gloo")
    launcher.launch()
    with pytest.raises(LoopError, match=f"rank {launcher.rank} has {1 + launcher.rank} micro-batches in step 1"):
        next(launcher.track([[{"x": torch.ones(1, 2)}] * (1 + launcher.rank)]))
    launcher.close()


@pytest.mark.parametrize("body", [uneven_evaluation, uneven_steps])
def test_ranks_have_equally_many_micro_batches(body):
    run_ranks(body, 2, init=False, timeout=30)


def steps_of_a_list():
    launcher = Launcher("ddp", accelerator="cpu", backend="gloo")
    launcher.launch()
    model = launcher.setup_model(Plain())
    taken = []
    for step in launcher.track([[{"x": torch.ones(1, 2)}]] * (2 + launcher.rank)):
        for micro in launcher.accumulate(model, step):
            launcher.backward(loss_of(model, micro), micro)
        taken.append((step.index, launcher.checkpoints.last))
    launcher.close()
    return taken


def nonfinite_on_one_rank(last):
    launcher = Launcher("ddp", accelerator="cpu", backend="gloo")
    launcher.launch()
    model = launcher.setup_model(Plain())
    for step in launcher.track([[{"x": torch.ones(1, 2)}]] * (1 if last else 3)):
        scale = torch.inf if launcher.rank == 1 else 1.0
        for micro in launcher.accumulate(model, step):
            launcher.backward(loss_of(model, micro) * scale, micro)
    launcher.close()


@pytest.mark.parametrize("last", [True, False])
def test_a_loss_that_is_not_finite_on_one_rank_ends_the_loop_on_all(last):
    with pytest.raises(RankFailed) as caught:
        run_ranks(nonfinite_on_one_rank, 2, last, init=False, timeout=30)
    found = caught.value.exceptions
    assert [type(error) for error in found.values()] == [NonFiniteError] * 2
    assert "the loss of a step was not finite" in str(found[0])


def test_loaders_of_different_lengths_end_together():
    assert run_ranks(steps_of_a_list, 2, init=False, timeout=30) == [[(1, False), (2, True)]] * 2


def test_what_is_used_before_launch_is_named():
    launcher = Launcher("single", accelerator="cpu")
    with pytest.raises(LoopError, match=r"launcher.world_size is known once"):
        print(launcher.world_size)
    with pytest.raises(LoopError, match=r"call launcher.launch\(\) first"):
        next(launcher.track([[]]))
    with pytest.raises(LoopError, match="before the first step"):
        launcher.log({})
    with pytest.raises(AttributeError):
        print(launcher.worldsize)


@pytest.mark.parametrize("batch", [{"x": 1}, torch.ones(2), [torch.ones(2)], "text"])
def test_a_loader_must_yield_lists(batch):
    with pytest.raises(DataError, match="setup_dataloader"):
        listed(batch)
    assert isinstance(listed([{"x": torch.ones(2)}])[0], MicroBatch)
