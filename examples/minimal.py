"""The launcher and one strategy around a plain module: `python examples/minimal.py [processes]`."""

from __future__ import annotations

import sys

import torch
from torch import nn

from veomni import Launcher, entrypoint
from veomni.strategies import FSDP2


@entrypoint
def main() -> None:
    launcher = Launcher(FSDP2(), devices=int(sys.argv[1]) if len(sys.argv) > 1 else 2, backend="gloo")
    launcher.launch()

    model = launcher.setup_model(nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)))
    optimizer = launcher.setup_optimizer(model, torch.optim.AdamW, lr=1e-2)
    rank, size = launcher.data_parallel
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    rows = {"x": inputs[rank::size], "y": inputs[rank::size].sum(1, keepdim=True)}

    for batch in launcher.track([[rows]] * 100):
        for micro in launcher.accumulate(model, batch):
            launcher.backward((model(micro.inputs["x"]) - micro.inputs["y"]).square().mean(), micro)
        optimizer.step()
        optimizer.zero_grad()
        loss = launcher.global_loss(batch)
        if launcher.is_rank_zero and batch.index % 20 == 0:
            print(f"step {batch.index}: loss {loss.item():.4f}", flush=True)
    launcher.close()


if __name__ == "__main__":
    main()
