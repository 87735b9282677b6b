"""What ``veomni plan`` predicts of a row, beside what was measured."""

from __future__ import annotations

from benchmarks.rows import build_config, ranks_of


def predicted_gib(row, gpus):
    """GiB at the peak of a step; 0 for a model whose activations it does not count."""
    from veomni.cli.memory import RowMemory
    from veomni.errors import ConfigError
    from veomni.metrics.activation_memory import ActivationPolicy
    from veomni.models import build_model
    from veomni.run_config.train import TrainSection

    sizes = {"ulysses": row.ulysses, "context": row.ring, "expert": row.experts}
    ranks = {f"{axis}_parallel_size": ranks_of(size, gpus) for axis, size in sizes.items()}
    options = {"cpu_offload": row.offload, "prefetch": row.prefetch}
    train = TrainSection(global_batch_size=gpus, output_dir="output", precision="bf16", strategy=options, **ranks)
    try:
        memory = RowMemory(build_model(build_config(row), weights="random"), train, gpus)
    except ConfigError:
        return 0.0
    policy = ActivationPolicy(row.recompute, row.inputs_offloaded, row.tile or None)
    return memory.peak(row.rows * row.length // train.ranks_per_row, policy) / 2**30
