"""The groups inside the section ``train``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from veomni.config.base import PathText, Section

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class MuonConfig(Section):
    """What is Muon's own; betas, eps and the other keys beside it are AdamW's, for what is no matrix of a block."""

    lr: float | None = Field(
        default=None,
        ge=0.0,
        description="Peak learning rate of the matrices; null takes that of AdamW, whose size steps are scaled to.",
    )
    momentum: float = Field(default=0.95, ge=0.0, lt=1.0, description="Decay rate of the mean of gradients.")
    nesterov: bool = Field(default=True, description="Look ahead by one gradient.")
    ns_steps: int = Field(default=5, ge=1, le=99, description="Newton-Schulz steps that orthogonalise a matrix.")
    exclude: list[str] = Field(
        default=[], description="Glob patterns of parameter or module names inside the blocks that AdamW gets."
    )


class OptimizerConfig(Section):
    """The optimizer and its groups."""

    name: Literal["adamw", "sgd", "muon"] = Field(
        default="adamw",
        description="The optimizer. muon is for the matrices of the blocks, with adamw for all other parameters.",
    )
    lr: float = Field(default=3e-4, ge=0.0, description="Peak learning rate.")
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)] = Field(
        default=[0.9, 0.95], description="AdamW's decay rates of the first and second moment."
    )
    eps: float = Field(default=1e-8, gt=0.0, description="AdamW's addend to the denominator.")
    weight_decay: float = Field(
        default=0.1, ge=0.0, description="Decoupled weight decay (AdamW, Muon), or L2 penalty (SGD)."
    )
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0, description="SGD's momentum.")
    no_decay: list[str] = Field(
        default=["*norm*", "*.bias"], description="Glob patterns of parameter names that weight_decay leaves alone."
    )
    lr_scale: dict[str, Annotated[float, Field(gt=0.0)]] = Field(
        default_factory=dict,
        description="Glob patterns of parameter or module names to factors of lr, such as {model.visual: 0.1}; of "
        "several that match a parameter the last counts.",
    )
    muon: MuonConfig = Field(default_factory=MuonConfig, description="Muon, with optimizer.name muon.")


class SchedulerConfig(Section):
    """Warm-up, then decay from ``optimizer.lr``."""

    name: Literal["constant", "linear", "cosine", "wsd"] = Field(
        default="cosine", description="Shape after the warm-up; wsd is constant until it decays at the end."
    )
    warmup_steps: int | None = Field(
        default=None, ge=0, description="Steps of linear warm-up; null follows warmup_ratio."
    )
    warmup_ratio: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="Warm-up as a share of all steps; null with warmup_steps null is no warm-up.",
    )
    min_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0, description="Final learning rate as a share of the peak.")
    decay_ratio: float = Field(
        default=0.1, gt=0.0, le=1.0, description="wsd only: share of all steps, at the end, in which the rate falls."
    )
    decay_shape: Literal["linear", "cosine", "sqrt"] = Field(
        default="linear", description="wsd only: how it falls; sqrt is 1 - sqrt(share of the decay done)."
    )


class FSDPConfig(Section):
    """How ``fsdp1`` and ``fsdp2`` shard."""

    sharding: Literal["full", "grad_op", "hybrid"] = Field(
        default="full",
        description="fsdp1 only: shard parameters, gradients and optimizer state (full), keep parameters gathered from "
        "forward to backward (grad_op), or shard within data_parallel_replicate_size replicas (hybrid).",
    )
    reshard_after_forward: bool = Field(
        default=True, description="fsdp2 only: free a block's gathered parameters after its forward."
    )
    reshard_after_backward: bool = Field(
        default=True, description="fsdp2 only: free them between the micro-batches of a step."
    )
    cpu_offload: bool = Field(
        default=False, description="Keep parameters, gradients and optimizer state in host memory."
    )
    prefetch: int = Field(
        default=0, ge=0, description="Blocks gathered ahead of use; 0 leaves it to PyTorch. fsdp1 knows only 0 and 1."
    )
    reduce_dtype: Literal["fp32", "bf16"] = Field(default="fp32", description="Format that bf16 runs sum gradients in.")


class ExpertParallelConfig(Section):
    """How tokens reach experts, with ``expert_parallel_size`` above 1."""

    outside: bool = Field(
        default=False,
        description="Share experts between ranks that are far apart, and gather each one among neighbours; false is "
        "the reverse.",
    )
    chunks: int = Field(
        default=1, ge=1, description="Parts of the tokens that travel one behind the other, while experts work."
    )
    exchange: Literal["exact", "fixed"] = Field(
        default="exact",
        description="exact sends the rows there are, whose number the host reads once per layer; fixed sends buffers "
        "of the largest possible size and reads nothing.",
    )


class CheckpointConfig(Section):
    """Saving and resuming."""

    save_steps: int | None = Field(
        default=None, ge=1, description="Steps between checkpoints; null saves none on the way."
    )
    keep_last: int = Field(
        default=2,
        ge=2,
        description="Checkpoints kept; at least 2, so that a damaged newest one has one to fall back to.",
    )
    async_save: bool = Field(default=False, description="Write in the background while training goes on.")
    resume: PathText = Field(
        default="auto",
        description="auto: the newest valid checkpoint in output_dir; none; or a checkpoint's path.",
    )
    save_final: bool = Field(default=True, description="Save a checkpoint at the end.")
    verify_hash: bool = Field(default=True, description="Compare every file with the manifest's hash before loading.")


class ExportConfig(Section):
    """What is written at the end besides the checkpoint."""

    hf: bool = Field(default=False, description="Write <output_dir>/hf, which transformers' from_pretrained loads.")


class EvalConfig(Section):
    """Evaluation on ``data.eval_path``, or on ``data.eval_fraction`` of the training documents."""

    every_steps: int | None = Field(default=None, ge=1, description="Steps between evaluations; null does none.")
    max_batches: int | None = Field(
        default=None, ge=1, description="Batches per evaluation; null reads all held-out data."
    )


class LoggingConfig(Section):
    """Where metrics go besides ``<output_dir>/metrics.jsonl``, which is always written."""

    wandb: bool = Field(
        default=False, description="Send metrics to Weights & Biases; the key comes from the environment only."
    )
    wandb_project: str = Field(default="veomni", min_length=1, description="Project that the run belongs to.")
    wandb_mode: Literal["online", "offline"] = Field(
        default="offline", description="offline writes <output_dir>/wandb only."
    )
    tensorboard: bool = Field(default=False, description="Write TensorBoard event files.")
    progress_bar: bool = Field(default=True, description="Show loss, speed and time left on a terminal.")
    plot: bool = Field(default=True, description="Draw <output_dir>/loss.png at the end.")


class MoEConfig(Section):
    """How a mixture of experts is kept balanced, and what is reported of it."""

    aux_loss_coef: float | None = Field(
        default=None,
        ge=0.0,
        description="Weight of the load-balancing loss over the global batch; null takes the model configuration's "
        "router_aux_loss_coef where it says output_router_logits, and is 0 elsewhere.",
    )
    z_loss_coef: float = Field(default=0.0, ge=0.0, description="Weight of the router z-loss over the global batch.")
    bias_update_rate: float = Field(
        default=0.0,
        ge=0.0,
        description="Balance without a loss: step by which the correction bias of experts moves towards equal load.",
    )
    balance_scope: Literal["step", "micro_batch"] = Field(
        default="step",
        description="Tokens that the load-balancing loss compares experts over. step, with several micro-batches, runs "
        "them forward once more to count.",
    )
    log_load_every: int | None = Field(
        default=10, ge=1, description="Steps between lines of expert_load.jsonl; null reports no load."
    )
