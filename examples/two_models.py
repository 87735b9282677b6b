"""Two models in one loop: a teacher learns from labels, a smaller student from the teacher while it learns.

python examples/two_models.py [processes]
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from veomni import FSDP2, Launcher, entrypoint

TEMPERATURE = 2.0


def spirals(count: int = 1536, arms: int = 3) -> TensorDataset:
    """Return points ``[count, 2]`` on interleaved spirals, and which one each is on."""
    draws = torch.Generator().manual_seed(0)
    labels, along = torch.arange(count) % arms, torch.rand(count, generator=draws)
    angle = 4 * along + 2 * torch.pi / arms * labels + 0.1 * torch.randn(count, generator=draws)
    return TensorDataset(torch.stack([along * angle.sin(), along * angle.cos()], 1), labels)


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 3))


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean divergence of the student's distribution from the teacher's, both softened."""
    logs, targets = (F.log_softmax(logits / TEMPERATURE, -1) for logits in (student, teacher))
    return F.kl_div(logs, targets, reduction="batchmean", log_target=True) * TEMPERATURE**2


@entrypoint
def main() -> None:
    launcher = Launcher(FSDP2(), devices=int(sys.argv[1]) if len(sys.argv) > 1 else 2, backend="gloo")
    launcher.launch()

    batches = DataLoader(spirals(), batch_size=32 // launcher.data_parallel.size, shuffle=True)
    loader = launcher.setup_dataloader(batches, accumulate=2, epochs=16)
    teacher, student = launcher.setup_model(mlp(64)), launcher.setup_model(mlp(32))
    optimizers = [launcher.setup_optimizer(model, torch.optim.AdamW, lr=1e-2) for model in (teacher, student)]

    for step in launcher.track(loader):
        pairs = zip(launcher.accumulate(teacher, step), launcher.accumulate(student, step), strict=True)
        for taught, learned in pairs:  # the same rows twice: each belongs to the step of its model
            points, labels = taught.args
            logits = teacher(points)
            launcher.backward(F.cross_entropy(logits, labels), taught)
            launcher.backward(divergence(student(points), logits.detach()), learned)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses = [launcher.global_loss(step, model).item() for model in (teacher, student)]
        if launcher.is_rank_zero and step.index % 48 == 0:
            print(f"step {step.index}: teacher {losses[0]:.4f}, student {losses[1]:.4f}", flush=True)
    launcher.close()


if __name__ == "__main__":
    main()
