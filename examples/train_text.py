"""Train a language model: one linear script, the loop in plain sight.

    python examples/train_text.py configs/text/tiny.yaml --train.max_steps 20

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
    output_dir = Path(config.train.output_dir)
    launcher = config.build_launcher()
    launcher.launch()  # from here on every line runs once per rank

    train_set, held_out = config.open_data()
    tokenizer = config.build_tokenizer(train_set)
    loader = config.build_loader(train_set, tokenizer, launcher)
    eval_loader = config.build_loader(held_out, tokenizer, launcher, train=False) if held_out else None

    model = launcher.setup_model(config.build_model(tokenizer))  # meta -> sharded -> weights
    optimizer = config.train.optimizer.build(model)
    steps = config.total_steps(loader)
    scheduler = config.train.scheduler.build(optimizer, steps)

    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    launcher.resume(state)
    if launcher.is_rank_zero:
        config.save_assets(model, tokenizer)

    for batch in launcher.track(loader, max_steps=steps):
        for micro in launcher.accumulate(model, batch):
            loss = model(**micro.inputs).loss
            launcher.backward(loss, micro)
        grad_norm = launcher.clip_grad_norm(model, config.train.max_grad_norm)
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

        metrics = {"loss": launcher.global_loss(batch), "grad_norm": grad_norm, "lr": lr}
        metrics |= launcher.source_metrics(batch)  # of a mixture (data.sources), by name
        every = config.train.eval.every_steps
        if eval_loader and every and (batch.index % every == 0 or batch.index == steps):
            metrics |= launcher.evaluate(model, islice(eval_loader, config.train.eval.max_batches))
        launcher.log(metrics)
        launcher.checkpoint(state)
    launcher.checkpoint(state)  # the data may end before the last step

    if config.train.export.hf:
        exported = launcher.export(model, output_dir / "hf", tokenizer=tokenizer)
        if launcher.is_rank_zero:
            complete(exported, "def ")
    launcher.close()


def complete(directory: Path, prompt: str) -> None:
    """Print what transformers alone, reading the exported directory, makes of ``prompt``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(0)
    tokens = model.generate(**inputs, max_new_tokens=80, do_sample=True, temperature=0.7, top_p=0.9)
    print(f"--- {directory}, read by transformers, continues {prompt!r}:\n{tokenizer.decode(tokens[0])}", flush=True)


if __name__ == "__main__":
    main()
