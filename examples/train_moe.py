"""Train a mixture-of-experts model: the loop of train_text.py, with experts spread over ranks.

    python examples/train_moe.py configs/text/tiny_moe.yaml --train.max_steps 20

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
    launcher = config.build_launcher()  # FSDP2(expert_parallel_size=...), Ulysses(size=...), as the train section says
    launcher.launch()  # from here on every line runs once per rank

    train_set, held_out = config.open_data()
    tokenizer = config.build_tokenizer(train_set)
    loader = config.build_loader(train_set, tokenizer, launcher)
    eval_loader = config.build_loader(held_out, tokenizer, launcher, train=False) if held_out else None

    model = launcher.setup_model(config.build_model(tokenizer))  # each rank reads its experts only
    optimizer = config.train.optimizer.build(model)  # one per mesh behind a single step(): experts live on their own
    steps = config.total_steps(loader)
    scheduler = config.train.scheduler.build(optimizer, steps)

    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    launcher.resume(state)  # whatever the expert and data sizes of the run that saved it
    if launcher.is_rank_zero:
        config.save_assets(model, tokenizer)

    for batch in launcher.track(loader, max_steps=steps):
        for micro in launcher.accumulate(model, batch):
            launcher.backward(model(**micro.inputs).loss, micro)
        grad_norm = launcher.clip_grad_norm(model, config.train.max_grad_norm)  # each expert once, over both meshes
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

        metrics = {"loss": launcher.global_loss(batch), "grad_norm": grad_norm, "lr": lr}
        metrics |= launcher.source_metrics(batch)  # of a mixture (data.sources), by name
        every = config.train.eval.every_steps
        if eval_loader and every and (batch.index % every == 0 or batch.index == steps):
            metrics |= launcher.evaluate(model, islice(eval_loader, config.train.eval.max_batches))
        launcher.log(metrics)  # and how busy experts are: expert_load_max_violation, expert_load.jsonl, expert_load.png
        launcher.checkpoint(state)
    launcher.checkpoint(state)  # the data may end before the last step

    if config.train.export.hf:
        launcher.export(model, Path(config.train.output_dir) / "hf", tokenizer=tokenizer)
    launcher.close()


if __name__ == "__main__":
    main()
