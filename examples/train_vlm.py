"""Train a vision-language model: the loop of train_text.py on conversations with images and videos.

    python examples/train_vlm.py configs/multimodal/tiny_vlm.yaml

It starts its own ranks (one per accelerator, or train.devices), and joins those of torchrun or Slurm.
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

from veomni import entrypoint, load_config
from veomni.from_config import (
    build_launcher,
    create_optimizer,
    create_scheduler,
    load_batches,
    load_datasets,
    load_model,
    load_tokenizer,
    save_assets,
    total_steps,
)


@entrypoint
def main() -> None:
    config = load_config(sys.argv[1:])
    launcher = build_launcher(config)
    launcher.launch()  # from here on every line runs once per rank

    train_set, held_out = load_datasets(config)
    tokenizer = load_tokenizer(config, train_set)
    loader = load_batches(config, train_set, tokenizer, launcher, train=True)  # decodes images in its workers
    eval_loader = load_batches(config, held_out, tokenizer, launcher, train=False) if held_out else None

    model = launcher.setup_model(load_model(config, tokenizer))  # tower, projector and language model, block by block
    optimizer = create_optimizer(config, model)  # with a learning rate by part (train.optimizer.lr_scale)
    steps = total_steps(config, loader)
    scheduler = create_scheduler(config, optimizer, steps)

    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    launcher.resume(state)
    if launcher.is_rank_zero:
        save_assets(config, model, tokenizer)

    for batch in launcher.track(loader, max_steps=steps):
        for micro in launcher.accumulate(model, batch):  # a rank without an image runs the tower all the same
            launcher.backward(model(**micro.inputs).loss, micro)
        grad_norm = launcher.clip_grad_norm(model, config.train.max_grad_norm)
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

        metrics = {"loss": launcher.global_loss(batch), "grad_norm": grad_norm, "lr": lr}
        metrics |= launcher.source_metrics(batch)  # of a mixture (data.sources), by name
        every = config.train.eval.every_steps
        if eval_loader and every and (batch.index % every == 0 or batch.index == steps):
            held_out_batches = islice(eval_loader, config.train.eval.max_batches)
            metrics |= launcher.evaluate(model, held_out_batches, answers=True)  # eval_accuracy: right word for word
        launcher.log(metrics)
        launcher.checkpoint(state)
    launcher.checkpoint(state)  # the data may end before the last step

    if config.train.export.hf:
        launcher.export(model, Path(config.train.output_dir) / "hf", tokenizer=tokenizer)
    launcher.close()


if __name__ == "__main__":
    main()
