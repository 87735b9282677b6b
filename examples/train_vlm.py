"""Train a vision-language model: the loop of train_text.py on conversations with images and videos.

    python examples/train_vlm.py configs/multimodal/tiny_vlm.yaml

It starts its own ranks (one per accelerator, or train.devices), and joins those of torchrun or Slurm.
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

from veomni import entrypoint, load_config


@entrypoint
def main() -> None:
    config = load_config(sys.argv[1:])
    launcher = config.build_launcher()
    launcher.launch()  # from here on every line runs once per rank

    train_set, held_out = config.open_data()
    tokenizer = config.build_tokenizer(train_set)
    loader = config.build_loader(train_set, tokenizer, launcher)  # decodes images in its workers
    eval_loader = config.build_loader(held_out, tokenizer, launcher, train=False) if held_out else None

    model = launcher.setup_model(config.build_model(tokenizer))  # tower, projector and language model, block by block
    optimizer = config.train.optimizer.build(model)  # with a learning rate by part (train.optimizer.lr_scale)
    steps = config.total_steps(loader)
    scheduler = config.train.scheduler.build(optimizer, steps)

    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    launcher.resume(state)
    if launcher.is_rank_zero:
        config.save_assets(model, tokenizer)

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
