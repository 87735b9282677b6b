"""This library's steps."""

from __future__ import annotations

import time
from statistics import median

from benchmarks.rows import build_config, micro_batch, ranks_of

WAITED = []
"""Seconds that each step of this process has waited for its batch, and for the agreement of all ranks on it."""


def lacks(row):
    """What of a row this library cannot do."""
    return ""


def strategies_of(row, gpus):
    import torch

    from veomni.strategies import (
        FSDP2,
        ActivationCheckpointing,
        Compile,
        ContextParallel,
        ExpertParallel,
        Float8,
        TiledMLP,
        Ulysses,
    )  # fmt: skip

    chosen = [FSDP2(prefetch=row.prefetch, cpu_offload=row.offload)]
    if row.experts:
        chosen.append(ExpertParallel(ranks_of(row.experts, gpus)))
    if row.ring:
        chosen.append(ContextParallel(ranks_of(row.ring, gpus)))
    if row.ulysses:
        chosen.append(Ulysses(ranks_of(row.ulysses, gpus), overlap=row.overlap))
    if row.float8:
        chosen.append(Float8(row.float8, emulate=not torch.cuda.is_available()))
    if row.recompute != "none":
        chosen.append(ActivationCheckpointing(row.recompute, offload=row.inputs_offloaded))
    if row.tile:
        chosen.append(TiledMLP(row.tile))
    return [*chosen, *[Compile()] * row.compile]


def optimizer_of(row, launcher, model):
    import torch

    if row.optimizer == "adamw":
        return launcher.setup_optimizer(model, torch.optim.AdamW, lr=1e-5, fused=True)
    return launcher.setup_optimizer(model, row.optimizer, lr=1e-5)


def prepare(row, gpus):
    """Launch, and return the launcher and the model to train."""
    from veomni import Launcher, build_model
    from veomni.strategies.transforms.precision import select_precision

    precision = select_precision("bf16", reduce=row.reduce)
    launcher = Launcher(strategies_of(row, gpus), precision=precision, devices=gpus)
    launcher.launch()
    config = build_config(row)
    if row.images:
        from benchmarks.photos import token_ids

        token_ids(config)
    return launcher, launcher.setup_model(build_model(config, weights="random", attention=row.attention)).train()


def batches_of(row, launcher, vocabulary):
    if row.images:
        from benchmarks.photos import image_loader

        return image_loader(row, launcher)
    if row.chats:
        from benchmarks.chats import chat_loader

        return chat_loader(row, launcher.data_parallel, vocabulary)
    seeds = launcher.data_parallel.rank * 1000
    batches = [[micro_batch(row, vocabulary, seeds + index)] for index in range(4)]
    return (batches[index % 4] for index in range(100_000))


def training(row, gpus):
    """Take a step at a time and yield how many tokens of it count for this GPU."""
    launcher, model = prepare(row, gpus)
    return steps_of(row, launcher, model, optimizer_of(row, launcher, model))


def steps_of(row, launcher, model, optimizer):
    """Train what :func:`prepare` returned."""
    from torch.profiler import record_function

    share = launcher.data_parallel.size / launcher.world_size
    steps = launcher.track(batches_of(row, launcher, model.config.get_text_config().vocab_size))
    while True:
        begin = time.perf_counter()
        with record_function("track"):
            step = next(steps)
        WAITED.append(time.perf_counter() - begin)
        for micro in launcher.accumulate(model, step):
            launcher.backward(model(**micro.inputs).loss, micro)
        launcher.clip_grad_norm(model, 1.0)
        optimizer.step()
        with record_function("zero_grad"):
            optimizer.zero_grad()
        yield share * sum(sum(micro.rows.document_lengths) for micro in step.micro_batches)


def facts(row, gpus):
    """What only this library reports of a row."""
    from benchmarks.arithmetic import flops_per_token
    from benchmarks.prediction import predicted_gib
    from veomni.compat.dry_runs import graph_breaks

    return {
        "flops_per_token": flops_per_token(row),
        "graph_breaks": float(graph_breaks()),
        "predicted_gib": predicted_gib(row, gpus),
        "data_ms": median(WAITED) * 1e3,
        "data_worst_ms": max(WAITED[1:]) * 1e3,
    }
