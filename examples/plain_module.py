"""A vision transformer of one's own reads handwritten digits: torch loaders, bf16, accumulation, torchmetrics, resume.

    python examples/plain_module.py [output_dir] [epochs]

The same command with more epochs continues from the last checkpoint, on any number of ranks.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from veomni import FSDP2, CheckpointSchedule, Launcher, Reporter, entrypoint
from veomni.batch.micro_batch import MicroBatch


class VisionTransformer(nn.Module):
    """Patches of 2 x 2 pixels, four blocks, the mean of all positions.

    Args:
        width: Size of a position's state.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(1, width, 2, 2), nn.Linear(width, 10)
        self.positions = nn.Parameter(torch.randn(16, width) * 0.02)
        blocks = [nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True, norm_first=True) for _ in range(4)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[batch, 10]`` of images ``[batch, 1, 8, 8]``."""
        hidden = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean(1))


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return the scans of scikit-learn, every fifth held out."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images, held_out = images.view(-1, 1, 8, 8).float() / 16, torch.arange(len(images)) % 5 == 0
    return TensorDataset(images[~held_out], labels[~held_out]), TensorDataset(images[held_out], labels[held_out])


@entrypoint
def main() -> None:
    output_dir = Path(sys.argv[1] if len(sys.argv) > 1 else "output/plain_module")
    epochs = int(sys.argv[2]) if len(sys.argv) > 2 else 12
    reporter = Reporter(output_dir)
    checkpoints = CheckpointSchedule(output_dir / "checkpoints", save_steps=50)
    launcher = Launcher(
        FSDP2(), precision="bf16", devices=2, backend="gloo", reporter=reporter, checkpoints=checkpoints
    )
    launcher.launch()

    train_set, held_out = digits()
    loader = launcher.setup_dataloader(DataLoader(train_set, batch_size=16, shuffle=True), accumulate=2, epochs=epochs)
    eval_loader = launcher.setup_dataloader(DataLoader(held_out, batch_size=64))  # each scan on one rank
    model = launcher.setup_model(VisionTransformer())
    optimizer = launcher.setup_optimizer(model, torch.optim.AdamW, lr=2e-3, weight_decay=0.05)
    accuracy = MulticlassAccuracy(num_classes=10, average="micro").to(launcher.device)

    def measure(model: nn.Module, micro: MicroBatch) -> Tensor:
        images, labels = micro.args
        logits = model(images)
        if micro.samples:  # 0 where a rank has fewer batches than another, and repeats one
            accuracy.update(logits, labels)
        return F.cross_entropy(logits, labels)

    state = {"model": model, "optimizer": optimizer, "loader": loader}
    launcher.resume(state)
    for step in launcher.track(loader):
        for micro in launcher.accumulate(model, step):  # gradients are exchanged in the last one's backward
            images, labels = micro.args
            launcher.backward(F.cross_entropy(model(images), labels), micro)  # logits are float32
        grad_norm = launcher.clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        metrics = {"loss": launcher.global_loss(step), "grad_norm": grad_norm}
        if step.index % loader.steps_per_epoch == 0:
            accuracy.reset()
            metrics |= launcher.evaluate(model, eval_loader, loss=measure)
            metrics["eval_accuracy"] = accuracy.compute()  # torchmetrics adds up the ranks' counts
        launcher.log(metrics)
        launcher.checkpoint(state)
    launcher.export(model, output_dir / "export")  # model.safetensors, by the names of the state_dict
    launcher.close()


if __name__ == "__main__":
    main()
