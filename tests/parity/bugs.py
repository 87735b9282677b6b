"""Classic ways to train wrongly, each seeded at a seam: a parity check must notice every one.

Each bug is one that a training library really had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.parity.matrix import Case, plain
from veomni.launch.world import DataParallel
from veomni.parallel.mesh import get_parallel_state
from veomni.strategies.grad_norm import sharded_grad_norm
from veomni.testing import seams
from veomni.testing.seams import Seam, replaced
from veomni.testing.step import Outcome


@dataclass(frozen=True)
class Bug:
    """A step with ``around`` at ``seam``."""

    seam: Seam
    around: Callable[..., Any]
    step: Case

    @property
    def ranks(self) -> int:
        return self.step.ranks

    def __str__(self) -> str:
        return self.around.__name__

    def run(self) -> Outcome:
        with replaced(self.seam, self.around):
            return self.step.run()


BUGS: list[Bug] = []


def bug(seam: Seam, step: Case) -> Callable[..., Any]:
    def enter(around: Callable[..., Any]) -> Callable[..., Any]:
        BUGS.append(Bug(seam, around, step))
        return around

    return enter


@bug(seams.LOSS_SHARE, plain("ddp", 2))
def gradient_doubled(share, *args):
    return 2 * share(*args)


@bug(seams.LOSS_SHARE, plain("fsdp2", 2))
def mean_of_micro_batch_means(share, loss, *args):
    return loss / 6


@bug(seams.STEP_SYNC, plain("ddp", 2))
def tokens_counted_on_one_rank_only(sync, counts):
    return sync({**counts, "token_weight": counts["token_weight"] if dist.get_rank() == 0 else 0})


@bug(seams.GROUP_SIZE, plain("fsdp2", 2))
def average_not_undone(size, state, axis):
    return 1 if axis == "loss" else size(state, axis)


@bug(seams.LABEL_SHIFT, plain("single", 1))
def label_shift_lost(shift, labels, fill):
    return labels


@bug(seams.MICRO_BATCHES, plain("fsdp1", 2))
def first_label_of_a_document_trained(accumulate, launcher, model, step):
    for micro in step.micro_batches:
        starts = micro["position_ids"] == 0
        micro["labels"][starts] = micro["input_ids"][starts]
    return accumulate(launcher, model, step)


@bug(seams.DOCUMENTS, plain("single", 1))
def documents_not_isolated(documents, inputs):
    return replace(documents(inputs), numbers=None)


@bug(seams.GRADIENT_SYNC, plain("ddp", 2))
def ddp_gradients_never_synchronised(grad_sync, strategy, model, last):
    return grad_sync(strategy, model, False)


@bug(seams.MICRO_BATCHES, plain("ddp", 2))
def earlier_micro_batches_forgotten(accumulate, launcher, model, step):
    for micro in accumulate(launcher, model, step):
        model.zero_grad()
        yield micro


@bug(seams.GRADIENT_NORM, plain("fsdp2", 2))
def norm_of_own_shard_only(norm, parameters, device):
    return torch.stack([p.grad.to_local().norm() for p in parameters if p.grad is not None]).norm()


@bug(seams.GRADIENT_NORM, plain("fsdp2_hybrid", 4))
def norm_counts_replicas(norm, *args):
    total = norm(*args).square()
    dist.all_reduce(total, group=get_parallel_state().group("dp_replicate"))
    return total.sqrt()


@bug(seams.INITIAL_VALUES, plain("fsdp1", 2))
def weights_differ_between_ranks(initialize, self, model, device, seed):
    initialize(self, model, device, seed + dist.get_rank())


@bug(seams.LOSS_WEIGHT, plain("single", 1))
def padding_counted_as_tokens(weight, micro):
    return int(micro["input_ids"].numel())


@bug(seams.LOSS_WEIGHT, plain("ddp", 2))
def masked_row_counts_as_a_mean(weight, micro):
    """A micro-batch without labels weighs like the others: the global mean becomes a mean over micro-batches."""
    return max(1, weight(micro)) + 1


@bug(seams.DATA_PARALLEL, plain("fsdp2", 2))
def same_rows_on_every_rank(place, launcher):
    return DataParallel(0, 2)


@bug(seams.STEP_LOSS, plain("fsdp2", 2))
def loss_not_reduced(loss, launcher, step):
    return step.of().loss


@bug(seams.EXPERT_AVERAGE, plain("fsdp2", 4, "qwen3_moe", experts="ep2"))
def expert_gradient_divided_by_its_copies_only(average_over, module, ranks):
    """The classic: the average over the ranks that hold an expert is ``ep`` times too large."""
    average_over(module, ranks // 2)


@bug(seams.GRADIENT_NORM_OF_FSDP1, plain("fsdp1", 2, "qwen3_moe", experts="ep2"))
def norms_of_two_meshes_added(norm, strategy, model):
    own = [p.grad for p in model.parameters() if p.grad is not None and not isinstance(p, DTensor)]
    rest = torch.stack([grad.norm() for grad in own if grad.numel()]).square().sum()
    dist.all_reduce(rest)
    experts = [p for p in model.parameters() if isinstance(p, DTensor)]
    return rest.sqrt() + sharded_grad_norm(experts, torch.device("cpu"))


@bug(seams.GRADIENT_SHARDING, plain("fsdp2_hybrid", 4, "qwen3_moe", experts="ep2"))
def norm_of_experts_on_one_mesh_axis_only(sharding, parameter):
    mesh, axes = sharding(parameter)
    return mesh, axes[:1]


@bug(seams.EXPERT_COMBINE, plain("fsdp2", 4, "qwen3_moe", experts="ep4_chunks"))
def tokens_beyond_a_capacity_dropped(combine, rows, routing):
    if not torch.is_grad_enabled():  # the trial runs of the set-up would notice
        return combine(rows, routing)
    rank = torch.repeat_interleave(torch.arange(len(routing.counts)), routing.counts)
    place = torch.arange(len(rows)) - (routing.offsets - routing.counts)[rank]
    return combine(rows * (place < routing.counts.max() - 1)[:, None], routing)


@bug(seams.EXPERT_COMBINE, plain("fsdp2", 2, "qwen3_moe", experts="ep2"))
def rows_given_back_to_the_wrong_tokens(combine, rows, routing):
    return combine(rows.roll(1, 0) if torch.is_grad_enabled() else rows, routing)
