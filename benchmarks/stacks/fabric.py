"""Lightning Fabric's steps over FSDP2, as its documentation sets them up: not compiled, logits of the whole batch."""

from __future__ import annotations

from benchmarks.rows import build_config, micro_batch, only_ours


def lacks(row):
    """What of a row Fabric is not set up for here."""
    if row.recompute == "selective" or row.offload:
        return "no selective activation checkpointing, no offloading"
    return "no expert parallelism" if row.experts else "no Ulysses" if row.ulysses or row.ring else only_ours(row)


def parallelize(model, mesh):
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["data_parallel"], mp_policy=policy)
    return fully_shard(model, mesh=mesh["data_parallel"], mp_policy=policy)


def training(row, gpus):
    """Take a step at a time and yield its tokens."""
    import torch
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import ModelParallelStrategy
    from transformers import AutoModelForCausalLM

    fabric = Fabric(devices=gpus, strategy=ModelParallelStrategy(parallelize))
    fabric.launch()
    config = build_config(row)
    with fabric.device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).train()
    if row.recompute == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = fabric.setup(model)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True))
    batches = [micro_batch(row, config.vocab_size, fabric.global_rank * 1000 + index) for index in range(4)]
    for index in range(100_000):
        batch = {name: value.to(fabric.device) for name, value in batches[index % 4].items()}
        fabric.backward(model(**batch).loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield batch["input_ids"].numel()
