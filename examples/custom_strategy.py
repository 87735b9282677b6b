"""A strategy of one's own: replicated parameters, whose gradients are averaged in bfloat16, half the bytes of DDP.

    python examples/custom_strategy.py [processes]

A package that names such a class in the entry-point group `veomni.strategies` makes it a value of
`train.data_parallel_mode`, with the arguments of its constructor as keys.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from veomni import Launcher, entrypoint
from veomni.strategies import ParameterStrategy
from veomni.strategies.base import SetupContext


class CompressedReplicas(ParameterStrategy):
    """Replicate parameters, average gradients in bfloat16."""

    name: ClassVar[str] = "compressed"

    def mesh_axes(self) -> Mapping[str, int]:
        """Take all ranks as replicas."""
        return {"dp_replicate": -1, "dp_shard": 1}

    def parallelize(self, model: nn.Module, context: SetupContext) -> nn.Module:
        """Give the model its values on this rank's device; every rank gets the same ones."""
        context.materialize(model, "")
        self.group, self.size = context.state.group("loss"), context.state.size("loss")
        return model.to(context.device)

    @contextmanager
    def grad_sync(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Run a micro-batch; after the last one, average what all of them left in ``grad``."""
        yield
        if last:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    half = parameter.grad.bfloat16() / self.size
                    dist.all_reduce(half, group=self.group)
                    parameter.grad.copy_(half)

    def grad_norm(self, model: nn.Module) -> Tensor:
        """Return the 2-norm of all gradients: replicas hold the same ones."""
        return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


@entrypoint
def main() -> None:
    launcher = Launcher(CompressedReplicas(), devices=int(sys.argv[1]) if len(sys.argv) > 1 else 2, backend="gloo")
    launcher.launch()

    inputs = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(inputs, inputs[:, :2].prod(1, keepdim=True).sign())
    loader = launcher.setup_dataloader(DataLoader(data, batch_size=64 // launcher.data_parallel.size), epochs=20)
    model = launcher.setup_model(nn.Sequential(nn.Linear(8, 128), nn.GELU(), nn.Linear(128, 1)))
    optimizer = launcher.setup_optimizer(model, torch.optim.AdamW, lr=1e-2)

    for step in launcher.track(loader):
        for micro in launcher.accumulate(model, step):
            x, y = micro.args
            launcher.backward(nn.functional.soft_margin_loss(model(x), y), micro)
        grad_norm = launcher.clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = launcher.global_loss(step)
        if launcher.is_rank_zero and step.index % 40 == 0:
            print(f"step {step.index}: loss {loss.item():.4f}, gradient norm {grad_norm.item():.4f}", flush=True)
    launcher.close()


if __name__ == "__main__":
    main()
