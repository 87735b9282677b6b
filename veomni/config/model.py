"""The section ``model``: which architecture, which weights, which tokenizer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from veomni.config.base import PathText, Section

Attention = Literal[
    "auto",
    "eager",
    "sdpa",
    "varlen",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
]
Experts = Literal["auto", "loop", "grouped_mm", "triton", "npu"]


class ModelConfig(Section):
    """Architecture, weights and tokenizer. Paths are relative to the working directory."""

    config_path: PathText | None = Field(
        default=None,
        description="The architecture: a registered name such as qwen3, a config.json file, or a directory with one. "
        "null reads it from model_path.",
    )
    model_path: PathText | None = Field(
        default=None,
        description="A directory with weights in Hugging Face layout, or the hub name of one in the local cache. "
        "null initialises at random from train.seed.",
    )
    config_overrides: dict[str, Any] = Field(
        default_factory=dict,
        description="Keys of the Hugging Face config to replace, such as num_hidden_layers; unknown ones are refused.",
    )
    tokenizer_path: PathText | None = Field(
        default=None,
        description="A tokenizer's directory. null takes the one in model_path or config_path.",
    )
    train_tokenizer_vocab_size: int | None = Field(
        default=None,
        ge=269,
        description="Train a byte-level BPE tokenizer of this many tokens on the training text; null uses a ready one.",
    )
    attention: Attention = Field(
        default="auto",
        description="Attention kernel. auto takes the fastest that is installed and keeps packed documents apart; "
        "varlen is PyTorch's own and needs CUDA and bf16, as the flash_attention kernels do.",
    )
    experts: Experts = Field(
        default="auto",
        description="Who multiplies in mixture-of-experts layers. auto takes the device's fastest that can; loop runs "
        "everywhere and in every precision, the others in bf16: grouped_mm is PyTorch's, triton needs CUDA.",
    )
    fused_loss: bool = Field(
        default=True, description="Compute the loss in chunks, without holding the logits of a whole row in memory."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code found in model_path. Leave it off for models you did not write."
    )
    freeze: list[str] = Field(
        default_factory=list,
        description="Glob patterns of parameter names that are not trained, such as model.embed_*.",
    )
    broadcast_weights: bool = Field(
        default=False, description="Rank 0 reads the weights and sends them; false lets every rank read its own part."
    )
