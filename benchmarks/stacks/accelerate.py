"""Accelerate's steps over FSDP2, as its documentation sets them up: not compiled, logits of the whole batch."""

from __future__ import annotations

import os

from benchmarks.rows import build_config, micro_batch, only_ours


def lacks(row):
    """What of a row Accelerate cannot do."""
    if row.recompute == "selective":
        return "no selective activation checkpointing"
    return "no expert parallelism" if row.experts else "no Ulysses" if row.ulysses or row.ring else only_ours(row)


def training(row, gpus):
    """Take a step at a time and yield its tokens."""
    import torch
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from transformers import AutoModelForCausalLM

    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        mixed_precision_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        activation_checkpointing=row.recompute == "full",
        cpu_offload=row.offload,
    )
    accelerator = Accelerator(mixed_precision="bf16", fsdp_plugin=plugin, cpu=not torch.cuda.is_available())
    config = build_config(row)
    with accelerator.device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    seeds = accelerator.process_index * 1000
    batches = [micro_batch(row, config.vocab_size, seeds + index) for index in range(4)]
    for index in range(100_000):
        batch = {name: value.to(accelerator.device) for name, value in batches[index % 4].items()}
        accelerator.backward(model(**batch).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield batch["input_ids"].numel()
