"""VeOmni upstream's steps (0.1.12): its model, kernels, collator and parallelisms in the order of its trainer.

Its package has this library's name: only processes that have its folder first on their path import this.
"""

from __future__ import annotations

import os
from itertools import pairwise

from benchmarks.rows import build_config, micro_batch, only_ours, ranks_of


def lacks(row):
    """What of a row it cannot do here."""
    if row.recompute == "selective":
        return "no selective activation checkpointing"
    return "no ring" if row.ring else only_ours(row)


def documents(row, vocabulary, seed):
    """The documents of a batch apart, as its packing collator takes them."""
    import torch

    batch = micro_batch(row, vocabulary, seed)
    ids, positions = batch["input_ids"].flatten(), batch["position_ids"].flatten()
    starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]
    pieces = [ids[a:b] for a, b in pairwise(starts)]
    return [{"input_ids": each, "labels": each.clone(), "attention_mask": torch.ones_like(each)} for each in pieces]


def prepare(row, gpus):
    """The group's state and the sharded model."""
    from veomni.arguments.arguments_types import MixedPrecisionConfig, OpsImplementationConfig
    from veomni.distributed.parallel_state import init_parallel_state
    from veomni.distributed.torch_parallelize import build_parallelize_model

    from veomni.models import build_foundation_model

    ulysses = ranks_of(row.ulysses, gpus)
    state = init_parallel_state(
        dp_size=gpus // ulysses, dp_shard_size=gpus // ulysses, ulysses_size=ulysses, dp_mode="fsdp2",
        extra_parallel_sizes=(ranks_of(row.experts, gpus),), async_enabled=row.overlap,
    )  # fmt: skip
    attention = os.environ.get("UPSTREAM_ATTENTION", "flash_attention_4")
    kernels = OpsImplementationConfig(attn_implementation=attention, rms_norm_gated_implementation="eager",
        causal_conv1d_implementation="eager", chunk_gated_delta_rule_implementation="eager")  # fmt: skip
    place = "meta" if gpus > 1 else "cuda"
    model = build_foundation_model(
        build_config(row), torch_dtype="float32", init_device=place, ops_implementation=kernels
    )
    return state, build_parallelize_model(
        model, init_device=place, enable_forward_prefetch=True, mixed_precision=MixedPrecisionConfig(enable=True),
        enable_gradient_checkpointing=row.recompute == "full", enable_fsdp_offload=row.offload,
    ).train()  # fmt: skip


def training(row, gpus):
    """Take a step at a time, as its trainer does, and yield how many tokens of it count for this GPU."""
    import torch
    import torch.distributed as dist
    from veomni.data.data_collator import MainCollator
    from veomni.distributed.clip_grad_norm import veomni_clip_grad_norm
    from veomni.utils.loss_utils import count_loss_token, mean_global_loss, reduce_global_loss_token

    from veomni.optim import build_optimizer

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    state, model = prepare(row, gpus)
    optimizer = build_optimizer(model, lr=1e-5, fused=True)
    collate, vocabulary = MainCollator(), model.config.vocab_size
    batches = [collate(documents(row, vocabulary, state.dp_rank * 1000 + index)) for index in range(4)]
    for index in range(100_000):
        micro = batches[index % 4]
        counts = count_loss_token(micro)
        everywhere = reduce_global_loss_token(counts)
        inputs = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in micro.items()}
        losses = mean_global_loss(model(**inputs, use_cache=False).loss, counts, counts, everywhere)
        sum(losses.values()).backward()
        veomni_clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield inputs["input_ids"].numel()
