"""The launcher and one strategy around a plain module: `python examples/minimal.py [processes]`."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from veomni import FSDP2, Launcher, entrypoint


@entrypoint
def main() -> None:
    launcher = Launcher(FSDP2(), devices=int(sys.argv[1]) if len(sys.argv) > 1 else 2, backend="gloo")
    launcher.launch()  # from here on every line runs once per rank

    inputs = torch.randn(640, 8, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    batches = DataLoader(data, batch_size=64 // launcher.data_parallel.size, shuffle=True)
    loader = launcher.setup_dataloader(batches, epochs=10)  # each rank reads its share
    model = launcher.setup_model(nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)))
    optimizer = launcher.setup_optimizer(model, torch.optim.AdamW, lr=1e-2)

    for step in launcher.track(loader):
        for micro in launcher.accumulate(model, step):
            x, y = micro.args
            launcher.backward((model(x) - y).square().mean(), micro)
        optimizer.step()
        optimizer.zero_grad()
        loss = launcher.global_loss(step)
        if launcher.is_rank_zero and step.index % 20 == 0:
            print(f"step {step.index}: loss {loss.item():.4f}", flush=True)
    launcher.close()


if __name__ == "__main__":
    main()
