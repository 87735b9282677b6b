"""torchtitan's steps (0.2.2): its Qwen3, its parallelisms, compiled blocks and loss, and the order of its trainer."""

from __future__ import annotations

import os
from types import SimpleNamespace

from benchmarks.rows import build_config, micro_batch, only_ours, ranks_of


def lacks(row):
    """What of a row torchtitan cannot do."""
    if row.packed and (row.ulysses or row.ring):
        return "documents are not kept apart under context parallelism"
    return only_ours(row)


def job_config(row, gpus):
    from torchtitan.config import JobConfig

    job = JobConfig()
    job.training.seq_len = row.rows * row.length if row.packed else row.length
    job.training.local_batch_size = 1 if row.packed else row.rows
    job.training.enable_cpu_offload = row.offload
    job.compile.enable = row.compile
    job.comm.trace_buf_size = 0  # its flight recorder writes files
    job.activation_checkpoint.mode = row.recompute
    job.activation_checkpoint.selective_ac_option = "op"
    job.parallelism.expert_parallel_degree = ranks_of(row.experts, gpus)
    job.parallelism.context_parallel_degree = ranks_of(row.ulysses, gpus) * ranks_of(row.ring, gpus)
    return job


def model_args(row):
    from torchtitan.models.moe import MoEArgs
    from torchtitan.models.qwen3 import Qwen3ModelArgs

    config = build_config(row)
    moe = getattr(config, "num_experts", 0)
    return Qwen3ModelArgs(
        dim=config.hidden_size, n_layers=config.num_hidden_layers, n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads, vocab_size=config.vocab_size, head_dim=config.head_dim,
        hidden_dim=config.intermediate_size, norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_parameters["rope_theta"], enable_weight_tying=config.tie_word_embeddings,
        attn_type="varlen" if row.packed else "sdpa", attn_mask_type="block_causal" if row.packed else "causal",
        moe_enabled=bool(moe), moe_inter_dim=getattr(config, "moe_intermediate_size", 0),
        moe_args=MoEArgs(
            num_experts=moe, num_shared_experts=0, top_k=config.num_experts_per_tok, score_func="softmax",
            route_norm=True, score_before_experts=False,
        ) if moe else MoEArgs(),
    )  # fmt: skip


def prepare(row, job, dims, device):
    """The sharded model, and an optimizer for each mesh: fused AdamW takes no parameters of two."""
    import torch
    from torchtitan.models.qwen3 import Qwen3Model, parallelize_qwen3

    args = model_args(row)
    args.update_from_config(job)
    with torch.device("meta"):
        model = Qwen3Model(args)
    model = parallelize_qwen3(model, dims, job)
    model.to_empty(device="cpu" if row.offload else device)
    with torch.no_grad():
        model.init_weights(buffer_device=device)
    meshes = {}
    for parameter in model.parameters():
        meshes.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return model.train(), [torch.optim.AdamW(each, lr=1e-5, fused=True) for each in meshes.values()]


def training(row, gpus):
    """Take a step at a time, as its trainer does, and yield how many tokens of it count for this GPU."""
    import torch
    from torchtitan.components.loss import build_cross_entropy_loss
    from torchtitan.distributed import ParallelDims, utils
    from torchtitan.distributed.context_parallel import prepare_context_parallel_input
    from torchtitan.tools.utils import GarbageCollection, device_module, device_type

    job = job_config(row, gpus)
    device_module.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device(device_type)
    utils.init_distributed(job.comm, enable_cpu_backend=row.offload)
    dims = ParallelDims(
        dp_replicate=1, dp_shard=-1, cp=job.parallelism.context_parallel_degree, tp=1, pp=1,
        ep=job.parallelism.expert_parallel_degree, etp=1, world_size=gpus,
    )  # fmt: skip
    collector = GarbageCollection(job.training.gc_freq)
    model, optimizers = prepare(row, job, dims, device)
    loss_of, amp = build_cross_entropy_loss(job), utils.maybe_enable_amp(dims, "bfloat16", device_type)
    batch_rank = dims.get_mesh("batch").get_local_rank() if dims.dp_enabled else 0
    batches = [micro_batch(row, model.vocab_size, batch_rank * 1000 + index) for index in range(4)]
    for index in range(1, 100_000):
        collector.run(index)
        for optimizer in optimizers:
            optimizer.zero_grad()
        ids, extra = inputs_of(row, batches[index % 4], model, device)
        labels, count = ids, ids.numel() * gpus / dims.cp
        if dims.cp_enabled:
            mesh = dims.get_mesh("cp")
            ids, labels, extra = prepare_context_parallel_input(ids, labels, extra, mesh, device)
        with amp:
            loss = loss_of(model(ids, **extra), labels) / count
        loss.backward()
        utils.clip_grad_norm_(list(model.parameters()), 1.0, foreach=True, ep_enabled=dims.ep_enabled)
        for optimizer in optimizers:
            optimizer.step()
        yield ids.numel()


def inputs_of(row, batch, model, device):
    """Tokens on the device, and the documents of a packed row, which torchtitan finds by their last token."""
    ids = batch["input_ids"]
    if not row.packed:
        return ids.to(device), {}
    last = (batch["position_ids"].roll(-1) == 0).to(device)
    ids = ids.clamp(max=model.vocab_size - 2).to(device).masked_fill(last, model.vocab_size - 1)
    return ids, {"attention_masks": model.get_attention_masks(ids, SimpleNamespace(eos_id=model.vocab_size - 1))}
