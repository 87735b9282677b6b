"""The section ``train``: layout, arithmetic, length and outputs of a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from veomni.config.base import PathText, Section
from veomni.config.train_parts import (
    CheckpointConfig,
    EvalConfig,
    ExpertParallelConfig,
    ExportConfig,
    FSDPConfig,
    LoggingConfig,
    MoEConfig,
    OptimizerConfig,
    SchedulerConfig,
)

AxisSize = Annotated[int, Field(ge=1)]


class TrainConfig(Section):
    """Layout, arithmetic, length and outputs of a run."""

    data_parallel_mode: Literal["single", "ddp", "fsdp1", "fsdp2"] = Field(
        default="fsdp2",
        description="Where parameters live: single process, replicated (ddp), or sharded (fsdp1 flattens them, fsdp2 "
        "shards each one).",
    )
    data_parallel_replicate_size: AxisSize = Field(
        default=1,
        description="Replicas of the sharded model (HSDP), with fsdp1 and fsdp2; the rest of the ranks share one.",
    )
    tensor_parallel_size: AxisSize = Field(default=1, description="Ranks that share each matrix product.")
    expert_parallel_size: AxisSize = Field(
        default=1, description="Ranks that share the experts of a mixture-of-experts model."
    )
    ulysses_parallel_size: AxisSize = Field(
        default=1, description="Ranks that share each row, exchanging attention heads."
    )
    ulysses_async: bool = Field(
        default=False, description="Overlap Ulysses' exchanges with the projections around them."
    )
    context_parallel_size: AxisSize = Field(
        default=1, description="Ranks that share each row, exchanging keys and values."
    )
    debug: bool = Field(
        default=False, description="Check in every micro-batch that ranks which share a row were given the same one."
    )
    precision: Literal["fp64", "fp32", "bf16"] = Field(
        default="bf16",
        description="Number format of compute. bf16 keeps weights, gradients and optimizer state in fp32.",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="Decides initial weights, order of the data and every random draw."
    )
    max_steps: int | None = Field(
        default=None,
        ge=1,
        description="Optimizer steps to train for, however often the data is read; null goes by epochs.",
    )
    num_train_epochs: int = Field(default=1, ge=1, description="Passes over the data, when max_steps is null.")
    micro_batch_size: int = Field(default=1, ge=1, description="Rows per forward on each data rank.")
    global_batch_size: int = Field(
        ge=1, description="Rows of data.max_seq_len tokens per optimizer step, over all ranks."
    )
    output_dir: PathText = Field(description="Directory that everything a run writes goes to.")
    devices: AxisSize | Literal["auto"] = Field(
        default="auto",
        description="Processes to start on this node; auto is one per accelerator, or cpu_devices without any.",
    )
    cpu_devices: AxisSize = Field(
        default=1, description="Processes that devices: auto starts on a machine without accelerator."
    )
    accelerator: Literal["auto", "cpu", "cuda", "npu"] = Field(
        default="auto", description="Device family; auto takes the one that is there."
    )
    backend: Literal["auto", "gloo", "nccl", "hccl"] = Field(
        default="auto",
        description="Collective library; auto is the accelerator's own. gloo lets ranks share one device.",
    )
    max_grad_norm: Annotated[float, Field(gt=0.0, allow_inf_nan=True)] = Field(
        default=1.0, description="Gradients are scaled down to this 2-norm; .inf only measures it."
    )
    log_every: int = Field(default=1, ge=1, description="Steps between lines of metrics.")
    timeout_seconds: int = Field(
        default=600, ge=1, description="Seconds after which a collective operation is given up and the run ends."
    )
    deterministic: bool = Field(
        default=False, description="Use only kernels that repeat bit for bit, at some cost in speed."
    )
    gradient_checkpointing: Literal["none", "full", "selective"] = Field(
        default="none",
        description="Recompute activations in the backward: per block (full), or all but the dearest (selective).",
    )
    compile: bool = Field(default=False, description="Compile each block with torch.compile.")
    balance_towers: bool = Field(
        default=False,
        description="Encode whole images, videos and sounds on the ranks whose towers have least to do.",
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="The optimizer.")
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig, description="The learning rate over time.")
    fsdp: FSDPConfig = Field(default_factory=FSDPConfig, description="How fsdp1 and fsdp2 shard.")
    expert_parallel: ExpertParallelConfig = Field(
        default_factory=ExpertParallelConfig, description="How tokens reach experts on other ranks."
    )
    moe: MoEConfig = Field(default_factory=MoEConfig, description="Routing of a mixture of experts.")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="Saving and resuming.")
    export: ExportConfig = Field(default_factory=ExportConfig, description="What is written at the end.")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="Evaluation on held-out data.")
    logging: LoggingConfig = Field(default_factory=LoggingConfig, description="Where metrics go.")
