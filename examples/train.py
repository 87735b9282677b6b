"""Train on any kind of data by its configuration: text, conversations, images, videos, audio. One linear script.

    python examples/train.py configs/text/tiny.yaml --train.max_steps 20

It starts its own ranks (one per accelerator, or train.devices), and joins those of torchrun or Slurm.
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

from veomni import entrypoint, load_config, show_sample


@entrypoint
def main() -> None:
    config = load_config(sys.argv[1:])
    launcher = config.build_launcher()  # strategies, accelerator and precision, as the train section says
    launcher.launch()  # from here on every line runs once per rank

    train_set, held_out = config.open_data()  # documents by index, a stream, or a mixture of sources
    tokenizer = config.build_tokenizer(train_set)
    loader = config.build_loader(train_set, tokenizer, launcher)
    eval_loader = config.build_loader(held_out, tokenizer, launcher, train=False) if held_out else None
    answers = config.data.has_media  # also evaluate which answers are right, word for word

    train = config.train
    model = train.make(  # meta -> sharded -> weights, block by block
        launcher.setup_model, model=config.build_model(tokenizer), router=train.router.build()
    )
    optimizer = train.optimizer.build(model)  # one for each mesh, behind a single step()
    steps = config.total_steps(loader)
    scheduler = train.scheduler.build(optimizer, steps)

    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    launcher.resume(state)  # on any layout and number of ranks
    if launcher.is_rank_zero:
        config.save_assets(model, tokenizer)

    for step in launcher.track(loader, max_steps=steps, gc_steps=train.gc_steps):
        for micro in launcher.accumulate(model, step):
            output = model(**micro.inputs)
            # A composed model has a loss for each of its components, each the mean over its own tokens.
            launcher.backward(getattr(output, "losses", output.loss), micro)
        grad_norm = launcher.clip_grad_norm(model, train.max_grad_norm)
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

        metrics = {"loss": launcher.global_loss(step), "grad_norm": grad_norm, "lr": lr}
        metrics |= launcher.global_losses(step)  # by component
        metrics |= launcher.source_metrics(step)  # by source of a mixture
        every = train.eval.every_steps
        if eval_loader and every and (step.index % every == 0 or step.index == steps):
            held_out_batches = islice(eval_loader, train.eval.max_batches)
            metrics |= launcher.evaluate(model, held_out_batches, answers=answers)
        launcher.log(metrics)
        launcher.checkpoint(state)
    launcher.checkpoint(state)  # the data may end before the last step

    if train.export.hf:
        exported = launcher.export(model, Path(train.output_dir) / "hf", tokenizer=tokenizer)
        if launcher.is_rank_zero and held_out:
            show_sample(exported, held_out.indexed, chat_template=config.data.chat_template)
    launcher.close()


if __name__ == "__main__":
    main()
