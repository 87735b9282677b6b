"""The section ``model``: which architecture, which weights, which tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field
from typing_extensions import override

from veomni.config.base import PathText, Section
from veomni.config.choice import Choice, Name, configured
from veomni.config.paths import exists, is_cached, is_directory
from veomni.config.problems import Problem
from veomni.config.section import ComponentSection
from veomni.errors import ConfigError
from veomni.ops.attention.backends import ATTENTION
from veomni.ops.experts.backends import EXPERTS

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig


class ModelSection(Section):
    """Architecture, weights and tokenizer. Paths are relative to the working directory."""

    configures = ("build_model", "build_config", "build_tokenizer")
    renames: ClassVar[Mapping[str, str]] = {"build_tokenizer.path": "tokenizer_path"}

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
        description="Keys of the Hugging Face config to replace, such as num_hidden_layers; unknown ones are rejected.",
    )
    tokenizer_path: PathText | None = Field(
        default=None, description="A tokenizer's directory. null takes the one in model_path or config_path."
    )
    train_tokenizer_vocab_size: int | None = Field(
        default=None,
        ge=269,
        description="Train a byte-level BPE tokenizer of this many tokens on the training text; null uses a ready one.",
    )
    attention: Annotated[ComponentSection, Choice(ATTENTION)] = configured(
        "auto",
        "Attention backend: a name, or a mapping of its name and options. auto takes the fastest that is "
        "installed and keeps packed documents apart; varlen is PyTorch's own and needs CUDA and bf16, as the "
        "flash_attention kernels do.",
    )
    experts: Annotated[str, Name(EXPERTS, "auto")] = Field(
        default="auto",
        description="Expert matmul backend of mixture-of-experts layers. auto takes the device's fastest; loop runs "
        "everywhere and in every precision, the others in bf16: grouped_mm is PyTorch's, triton needs CUDA.",
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code found in model_path. Leave it off for models you did not write."
    )
    freeze: list[str] = Field(
        default_factory=list,
        description="Glob patterns of parameter names that are not trained, such as model.embed_*.",
    )

    @property
    def source(self) -> str:
        """What names the architecture; a ConfigError where nothing does."""
        source = self.config_path or self.model_path
        if source is None:
            raise ConfigError("no model was given", "give a configuration or a directory with weights")
        return source

    def build_config(self) -> PreTrainedConfig:
        """Return the architecture's configuration, with the overrides."""
        from veomni.models import build_config

        return build_config(self.source, self.config_overrides, trust_remote_code=self.trust_remote_code)

    def build(self) -> nn.Module:
        """Return the model on the meta device, with its frozen parameters."""
        from veomni.models import build_model, freeze

        model = build_model(
            self.build_config(),
            attention=self.attention.build(),
            experts=self.experts,
            weights=self.model_path or "random",
            trust_remote_code=self.trust_remote_code,
        )
        if self.freeze:
            freeze(model, self.freeze)
        return model

    def check_fit(self, architecture: Any, tokenizer: Any, max_seq_len: int) -> None:
        """Raise a ConfigError where tokens have no embedding, or rows more tokens than there are positions."""
        text = architecture.get_text_config()
        if len(tokenizer) > text.vocab_size:
            problem = f"the tokenizer has {len(tokenizer)} tokens, the model embeds {text.vocab_size}"
            fix = f"set model.config_overrides.vocab_size to {len(tokenizer)}, or use the model's own tokenizer"
            raise ConfigError(problem, fix)
        longest = getattr(text, "max_position_embeddings", None)
        if longest is not None and max_seq_len > longest:
            problem = f"data.max_seq_len is {max_seq_len}, the model has {longest} positions"
            raise ConfigError(problem, f"set data.max_seq_len to at most {longest}")

    @override
    def path_problems(self) -> Iterator[Problem]:
        if self.model_path is not None and not is_cached(self.model_path):
            yield from is_directory("model.model_path", self.model_path, "it holds config.json and *.safetensors")
        if self.tokenizer_path is not None and not is_cached(self.tokenizer_path):
            yield from is_directory("model.tokenizer_path", self.tokenizer_path, "it holds the tokenizer's files")
        path = self.config_path or ""
        if (os.sep in path or path.endswith(".json")) and not is_cached(path):
            yield from exists("model.config_path", path)
        ready = (self.tokenizer_path, self.model_path, self.train_tokenizer_vocab_size)
        if ready == (None, None, None) and not os.path.isdir(path) and not is_cached(path):
            problem = "no key says where the tokenizer comes from"
            yield Problem(problem, "set model.tokenizer_path, model.model_path or model.train_tokenizer_vocab_size")

    @override
    def problems(self, config: Any, world: int | None) -> Iterator[Problem]:
        if self.config_path is None and self.model_path is None:
            yield Problem("model.config_path and model.model_path are both null", "set one: it names the architecture")
        if self.train_tokenizer_vocab_size is not None:
            for key in ("tokenizer_path", "model_path"):
                if getattr(self, key) is not None:
                    problem = f"model.train_tokenizer_vocab_size and model.{key} both give a tokenizer"
                    yield Problem(problem, "set one to null")
        if config.train.broadcast_weights and self.model_path is None:
            yield Problem("train.broadcast_weights is set without model.model_path", "set it to false: nothing is read")
        if self.experts != "auto":
            yield from EXPERTS.get(self.experts).config_problems(self.experts, config.train)
