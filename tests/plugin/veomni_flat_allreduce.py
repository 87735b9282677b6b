"""A third-party strategy, as another package would hold it: one all-reduce of all gradients at the end of a step."""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.distributed as dist

from veomni.strategies import ParameterStrategy
from veomni.strategies.grad_norm import sharded_grad_norm


class FlatAllReduce(ParameterStrategy):
    name = "flat_allreduce"

    def mesh_axes(self):
        return {"dp_replicate": -1, "dp_shard": 1}

    def parallelize(self, model, context):
        context.materialize(model, "")
        self.placed = context.placed_parameters()
        self.group = context.state.group("loss")
        return model.to(context.device)

    @contextmanager
    def grad_sync(self, model, last):
        yield
        if last:
            gradients = [p.grad for p in model.parameters() if p.grad is not None and p not in self.placed]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat, group=self.group)
            flat /= dist.get_world_size(self.group)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def grad_norm(self, model):
        return sharded_grad_norm(model.parameters(), next(model.parameters()).device)
