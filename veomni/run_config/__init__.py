"""The configuration of a run: the sections ``model``, ``data`` and ``train``, and what they build together."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, ValidationError
from torch import nn

from veomni.config.base import Section
from veomni.config.fields import record_keys
from veomni.config.keys import choices, walk
from veomni.config.overrides import USAGE, apply_overrides, parse_argv
from veomni.config.problems import Problem, explain, raise_problems
from veomni.config.yaml_file import read_yaml, save_args
from veomni.data import DocumentStream, PackedLoader, StreamLoader
from veomni.data.section import DataSection
from veomni.errors import ConfigError, LayoutError
from veomni.launch import detect_environment
from veomni.launcher import Launcher
from veomni.models.build.section import ModelSection
from veomni.run_config.train import TrainSection
from veomni.strategies.select import mesh_dims
from veomni.strategies.transforms.activation_budget import ActivationBudget, choose
from veomni.strategies.transforms.precision import select_precision

__all__ = ["Config", "check_layout", "load_config", "save_args"]


class Config(Section):
    """Everything that decides a run."""

    model: ModelSection = Field(description="Which architecture, which weights, which tokenizer.")
    data: DataSection = Field(description="What is read and how it becomes rows.")
    train: TrainSection = Field(description="Layout, arithmetic, length and outputs of the run.")

    RENAMED: ClassVar[Mapping[str, str]] = {
        "data.overlong": "data.on_overflow",
        "data.weigh_by": "data.sampling",
        "data.stopping": "data.stopping_strategy",
        "data.media.sound_in_video": "data.media.use_audio_in_video",
        "model.fused_loss": "train.fused_loss",
        "model.broadcast_weights": "train.broadcast_weights",
        "train.fsdp": "train.strategy",
        "train.fsdp.reduce_dtype": "train.reduce_dtype",
        "train.expert_parallel.outside": "train.expert_parallel.placement",
        "train.ulysses_async": "train.ulysses.overlap",
        "train.debug": "train.validate_batches",
        "train.gradient_checkpointing": "train.activation_checkpointing",
        "train.balance_towers": "train.balance_encoders",
        "train.moe": "train.router",
        "train.optimizer.muon": "train.optimizer",
        "train.logging.wandb": "train.loggers",
        "train.logging.tensorboard": "train.loggers",
    }
    """Keys of earlier versions, and what replaces them: named in the message that rejects them."""

    @classmethod
    def from_file(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Return the configuration in a YAML file, with overrides applied and the keys checked against each other.

        Overrides are values by dotted key, such as ``{"train.max_steps": 20}``. A ConfigError names every key that is
        wrong, where it was given, and the fix; files and directories that the configuration names are not looked at.
        """
        values, lines = read_yaml(path)
        places = {".".join(key): place for key, place in lines.items()}
        places |= {key: f"--{key}" for key in overrides or {}}
        try:
            config = cls.model_validate(apply_overrides(values, overrides or {}, choices(cls)))
        except ValidationError as error:
            raise_problems(explain(error, cls, places), str(path))
            raise
        raise_problems(_problems(config, None), str(path))
        return config

    def build_launcher(self) -> Launcher:
        """Return a launcher for the ``train`` section, its layout checked; nothing is started yet."""
        train, joined = self.train, detect_environment()
        accelerator = train.accelerator.build()
        accelerator.require()
        devices = train.local_processes(accelerator.device_type, accelerator.device_count())
        world = devices if joined is None else joined.world_size
        check_layout(self, world)
        strategies = train.build_strategies(self.data.max_seq_len)
        facts = self.model.build_config().get_text_config().to_dict()
        for strategy in strategies:
            strategy.check_model(facts, self.data.max_seq_len, mesh_dims(strategies, world))
        for budget in [each for each in strategies if isinstance(each, ActivationBudget)]:
            self._check_budget(budget)
        output_dir = Path(train.output_dir)
        loggers = [section.build(output_dir=output_dir) for section in train.loggers]
        reporter = train.logging.build(
            output_dir=output_dir, loggers=loggers, log_every=train.log_every, config=self.model_dump(mode="json"),
            profile=train.profile.build(),
        )  # fmt: skip
        return train.make(
            Launcher,
            strategy=strategies,
            accelerator=accelerator,
            precision=select_precision(train.precision, reduce=train.reduce_dtype),
            devices=None if joined is not None and train.devices == "auto" else devices,
            reporter=reporter,
            checkpoints=train.checkpoint.build(directory=output_dir / "checkpoints"),
        )

    def _check_budget(self, budget: ActivationBudget) -> None:
        from veomni.models import build_model

        model = build_model(self.model.build_config(), weights="random")
        choose(self.train.count_activations(model), budget.memory, budget.tokens)

    def open_data(self) -> tuple[DocumentStream, DocumentStream | None]:
        """Return the training documents, indexed or as a stream, and the held-out ones, or None."""
        return self.data.open(self.train.seed)

    def build_tokenizer(self, dataset: DocumentStream) -> Any:
        """Return a ready tokenizer, or one trained once on the documents of ``dataset``."""
        from veomni.data import cached_byte_bpe
        from veomni.models import build_tokenizer

        model = self.model
        if model.train_tokenizer_vocab_size is not None:
            trained = cached_byte_bpe(dataset, model.train_tokenizer_vocab_size, self.data.cache_dir)
            return build_tokenizer(trained)
        return build_tokenizer(model.tokenizer_path or model.model_path or model.source)

    def build_loader(
        self, dataset: DocumentStream, tokenizer: Any, launcher: Launcher, *, train: bool = True
    ) -> PackedLoader | StreamLoader:
        """Return the loader of this rank's micro-batches; ``train`` is False for held-out data."""
        return self.data.build_loader(self, dataset, tokenizer, launcher, train=train)

    def build_model(self, tokenizer: Any) -> nn.Module:
        """Return the model of the ``model`` section, on the meta device, that fits the tokenizer and the rows."""
        self.model.check_fit(self.model.build_config(), tokenizer, self.data.max_seq_len)
        return self.model.build()

    def total_steps(self, loader: PackedLoader | StreamLoader) -> int:
        """Return the optimizer steps of the whole run."""
        if self.train.max_steps:
            return self.train.max_steps
        if loader.steps_per_epoch is None:
            raise ConfigError("the data is packed while it is read: its steps are not known", "set train.max_steps")
        return loader.steps_per_epoch * self.train.num_train_epochs

    def save_assets(self, model: nn.Module, tokenizer: Any) -> None:
        """Write what explains the run's weights: arguments, architecture and tokenizer; to be called on one rank."""
        from veomni.models import unwrap

        output_dir = Path(self.train.output_dir)
        save_args(self, output_dir)
        tokenizer.save_pretrained(output_dir / "model_assets")
        unwrap(model).config.save_pretrained(output_dir / "model_assets")  # type: ignore[union-attr, operator]


def check_layout(config: Config, world_size: int) -> None:
    """Raise a LayoutError that names every key of a mesh axis or batch size that does not fit so many ranks in all."""
    raise_problems(_problems(config, world_size), "the layout", LayoutError)


def _problems(config: Config, world: int | None) -> Iterator[Problem]:
    for section in config.sections():
        yield from section.problems(config, world)


def load_config(argv: Sequence[str]) -> Config:
    """Return the configuration that a training script's command line names; ``--help`` prints all keys and exits.

    ``argv`` is ``sys.argv[1:]``: a YAML file and any number of ``--section.key VALUE`` or ``--section.key=VALUE``.
    Values are YAML: ``1e-4``, ``true``, ``null``, ``[0.9, 0.95]``; other text goes in quotes. A ConfigError names
    everything that is wrong, and the fix; also where a file or directory that it names is not there.
    """
    if "--help" in argv or "-h" in argv:
        keys = (f"  --{key}\n      {field.description}" for key, field in walk(Config) if "." in key)
        print(f"usage: {USAGE}", "", *keys, sep="\n")
        sys.exit(0)
    config = Config.from_file(*parse_argv(argv))
    record_keys(Config)
    raise_problems((found for section in config.sections() for found in section.path_problems()), "the configuration")
    return config
