"""Turn the sections of a configuration into the objects a script uses; each could as well be built by hand."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from veomni.accelerators import select_accelerator
from veomni.batch.split import SequenceShard
from veomni.config import Config, TrainConfig, check_layout, save_args
from veomni.config.layout import local_processes
from veomni.errors import ConfigError, LayoutError
from veomni.launch import detect_environment
from veomni.launcher import Launcher
from veomni.loop.checkpoint_schedule import CheckpointSchedule
from veomni.loop.reporter import Reporter
from veomni.strategies import DDP, FSDP1, FSDP2, ContextParallel, ParameterStrategy, Single, Strategy, Ulysses
from veomni.strategies.expert_parallel import refuse_experts
from veomni.strategies.transforms.precision import select_precision

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

    from veomni.data import Mixture, PackedDataLoader, StreamLoader, TextDataset
    from veomni.data.multimodal import MultimodalTransform
    from veomni.data.text.samples import SampleMaker
    from veomni.loggers import Logger


def build_launcher(config: Config) -> Launcher:
    """Return a launcher for the ``train`` section; nothing is started yet."""
    from veomni.moe import MoEOptions

    train, output_dir = config.train, Path(config.train.output_dir)
    save, accelerator = train.checkpoint, select_accelerator(train.accelerator)
    devices = local_processes(train, accelerator.device_type, accelerator.device_count())
    joined = detect_environment()
    check_layout(config, devices if joined is None else joined.world_size)
    _check_shared_rows(config)
    _check_experts(config)
    return Launcher(
        build_strategies(train),
        accelerator=accelerator,
        precision=select_precision(train.precision, reduce=train.fsdp.reduce_dtype),
        devices=None if joined is not None and train.devices == "auto" else devices,
        backend=train.backend,
        seed=train.seed,
        recompute=train.gradient_checkpointing,
        compile=train.compile,
        balance_towers=train.balance_towers,
        fused_loss=config.model.fused_loss,
        router=MoEOptions(**train.moe.model_dump()),
        broadcast_weights=config.model.broadcast_weights,
        deterministic=train.deterministic,
        timeout_seconds=train.timeout_seconds,
        reporter=Reporter(
            output_dir,
            loggers=_extra_loggers(config),
            progress_bar=train.logging.progress_bar,
            log_every=train.log_every,
            plot=train.logging.plot,
            config=config.model_dump(mode="json"),
        ),
        checkpoints=CheckpointSchedule(
            output_dir / "checkpoints",
            save_steps=save.save_steps,
            save_final=save.save_final,
            resume=save.resume,
            keep_last=save.keep_last,
            async_save=save.async_save,
            verify_hash=save.verify_hash,
        ),
    )


def _check_shared_rows(config: Config) -> None:
    """Refuse heads and rows that ranks cannot share, before any of them is started."""
    from veomni.models import build_config
    from veomni.ops.attention.ulysses import refuse_heads

    section, train = config.model, config.train
    shard = SequenceShard(train.ulysses_parallel_size, 0, train.context_parallel_size, 0)
    source = section.config_path or section.model_path
    if shard.size == 1 or source is None:
        return
    if config.data.max_seq_len < shard.multiple:
        raise LayoutError(
            f"data.max_seq_len {config.data.max_seq_len} is too short for {shard.size} ranks per row "
            f"(train.ulysses_parallel_size {shard.ulysses} x train.context_parallel_size {shard.cp})",
            f"set data.max_seq_len to at least {shard.multiple}",
        )
    architecture: Any = build_config(source, section.config_overrides, trust_remote_code=section.trust_remote_code)
    heads = architecture.get_text_config().to_dict().get("num_attention_heads")
    if heads is not None:  # in some models they differ from layer to layer: setup_model checks each
        refuse_heads(heads, shard.ulysses)


def _check_experts(config: Config) -> None:
    """Refuse experts that ranks cannot share, before any of them is started."""
    from veomni.models import build_model, derive_plan

    section, size = config.model, config.train.expert_parallel_size
    source = section.config_path or section.model_path
    if size == 1 or source is None:
        return
    trust = section.trust_remote_code
    model = build_model(source, overrides=section.config_overrides, weights="random", trust_remote_code=trust)
    refuse_experts(model, derive_plan(model), size)


def build_strategies(train: TrainConfig) -> list[Strategy]:
    """Return the strategies of the ``train`` section: the one that holds the parameters, and those beside it."""
    strategies: list[Strategy] = [build_strategy(train)]
    if train.context_parallel_size > 1:
        strategies.append(ContextParallel(train.context_parallel_size, check_rows=train.debug))
    if train.ulysses_parallel_size > 1:
        strategies.append(Ulysses(train.ulysses_parallel_size, async_=train.ulysses_async, check_rows=train.debug))
    return strategies


def build_strategy(train: TrainConfig) -> ParameterStrategy:
    """Return the strategy that ``train.data_parallel_mode`` names, with the options of ``train.fsdp``."""
    fsdp, replicate = train.fsdp, train.data_parallel_replicate_size
    experts: dict[str, Any] = {
        "expert_parallel_size": train.expert_parallel_size,
        "expert_parallel_outside": train.expert_parallel.outside,
        "expert_chunks": train.expert_parallel.chunks,
        "expert_exchange": train.expert_parallel.exchange,
    }
    match train.data_parallel_mode:
        case "single":
            return Single()
        case "ddp":
            return DDP()
        case "fsdp1":
            return FSDP1(
                replicate=replicate,
                sharding="grad_op" if fsdp.sharding == "grad_op" else "full",
                cpu_offload=fsdp.cpu_offload,
                forward_prefetch=fsdp.prefetch > 0,
                **experts,
            )
        case "fsdp2":
            return FSDP2(
                replicate=replicate,
                reshard_after_forward=fsdp.reshard_after_forward,
                reshard_after_backward=fsdp.reshard_after_backward,
                cpu_offload=fsdp.cpu_offload,
                prefetch=fsdp.prefetch,
                **experts,
            )


def _extra_loggers(config: Config) -> list[Logger]:
    from veomni.loggers import TensorBoardLogger, WandbLogger

    choice, output_dir = config.train.logging, Path(config.train.output_dir)
    loggers: list[Logger] = []
    if choice.wandb:
        loggers.append(WandbLogger(output_dir, project=choice.wandb_project, mode=choice.wandb_mode))
    if choice.tensorboard:
        loggers.append(TensorBoardLogger(output_dir))
    return loggers


def load_datasets(config: Config) -> tuple[TextDataset | Mixture, TextDataset | Mixture | None]:
    """Return the training documents, indexed or as a stream, and the held-out ones, or None."""
    from veomni.data import DataSource, build_dataset

    data = config.data
    keys = ("data_type", "format", "text_key", "messages_key")
    kind: dict[str, Any] = {key: getattr(data, key) for key in keys}
    sources, held_out_sources = [], []
    for source in data.sources:
        given = {key: getattr(source, key) or kind[key] for key in keys}
        sources.append(DataSource(source.path, source.name, source.weight, **given))
        if source.eval_path is not None:
            held_out_sources.append(DataSource(source.eval_path, source.name, **given))
    train, held_out = build_dataset(
        data.train_path,
        sources=sources,
        streaming=data.streaming,
        weigh_by=data.weigh_by,
        stopping=data.stopping,
        max_documents=data.max_documents,
        eval_fraction=0.0 if data.eval_path else data.eval_fraction,
        seed=config.train.seed,
        cache_dir=data.cache_dir,
        **kind,
    )
    if held_out_sources:
        return train, build_dataset(sources=held_out_sources, cache_dir=data.cache_dir)[0]
    if data.eval_path is not None:
        held_out, _ = build_dataset(data.eval_path, cache_dir=data.cache_dir, **kind)
    return train, held_out


def load_media_transform(config: Config, tokenizer: Any) -> MultimodalTransform:
    """Return what makes samples of conversations with media, as ``data`` and ``data.media`` say.

    Raises:
        ConfigError: no family is known for the model, or it has no such setting.
        DataError: there is no chat template.
    """
    from veomni.data.multimodal import (
        FeatureCache,
        MediaLimits,
        MediaReader,
        MediaSettings,
        MultimodalTransform,
        build_family,
        settings_of,
    )  # fmt: skip
    from veomni.data.sources.cache import cache_directory
    from veomni.data.sources.fetch import Fetch
    from veomni.data.sources.formats import MESSAGES
    from veomni.data.text.chat_templates import find_chat_template
    from veomni.models import build_config
    from veomni.models.build.config import find_directory

    model, data, media = config.model, config.data, config.data.media
    source = model.config_path or model.model_path
    if source is None:
        raise ConfigError("no model was given", "set model.config_path or model.model_path")
    architecture = build_config(source, model.config_overrides, trust_remote_code=model.trust_remote_code)
    values = media.model_dump()
    settings = MediaSettings(**{field.name: values[field.name] for field in fields(MediaSettings)})
    limits = MediaLimits(**{field.name: values[field.name] for field in fields(MediaLimits)})
    given = (find_directory(path) for path in (model.tokenizer_path, model.model_path) if path)
    directory = next((path for path in given if path), None)
    family = build_family(architecture, tokenizer, directory, settings)
    cache = None
    if media.cache_gib:
        place = cache_directory(data.cache_dir) / "media"
        cache = FeatureCache(place, int(media.cache_gib * (1 << 30)), [settings_of(family), asdict(limits)])
    template = find_chat_template(data.chat_template, tokenizer)
    fetch = Fetch(media.url_hosts, max_bytes=media.max_bytes, timeout=media.url_timeout) if media.url_hosts else None
    reader = MediaReader(Path(media.root), fetch, limits)
    return MultimodalTransform(family, tokenizer, template, reader, MESSAGES, cache)


def load_samples(config: Config, dataset: TextDataset | Mixture, tokenizer: Any, shard: SequenceShard) -> SampleMaker:
    """Return what makes samples and micro-batches of a dataset of conversations with media."""
    from veomni.data import Mixture
    from veomni.data.loading.build_dataloader import text_samples
    from veomni.data.multimodal import MediaSamples, SkipBadMedia, settings_of
    from veomni.data.multimodal.collate import MultimodalCollator
    from veomni.data.sources.digests import digest, tokenizer_digest

    data, media = config.data, config.data.media
    transform = load_media_transform(config, tokenizer)
    architecture = transform.family.parts.config
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    collator = MultimodalCollator(architecture, max_seq_len=data.max_seq_len, pad_token_id=int(pad or 0), shard=shard)
    layouts = [source.layout for source in dataset.sources] if isinstance(dataset, Mixture) else [dataset.layout]
    kinds, texts = [layout.data_type for layout in layouts], None
    if set(kinds) != {"multimodal"}:
        texts = text_samples(layouts, tokenizer, data.max_seq_len, data.overlong, shard, data.chat_template)
    return MediaSamples(
        transform,
        collator,
        skipping=SkipBadMedia(media.max_skipped) if media.on_bad_media == "skip" else None,
        kinds=kinds,
        texts=texts,
        overlong=data.overlong,
        digests={
            "tokenizer": tokenizer_digest(tokenizer),
            "chat template": digest(transform.chat_template),
            "layouts": digest([layout.facts() for layout in layouts]),
            "media": digest(settings_of(transform.family)),
        },
    )


def load_tokenizer(config: Config, dataset: TextDataset | Mixture) -> Any:
    """Return the tokenizer of the run: a ready one, or one trained on the documents by whichever rank comes first."""
    from veomni.data import cached_byte_bpe
    from veomni.models import build_tokenizer

    model = config.model
    if model.train_tokenizer_vocab_size is not None:
        return build_tokenizer(cached_byte_bpe(dataset, model.train_tokenizer_vocab_size, config.data.cache_dir))
    path = model.tokenizer_path or model.model_path or model.config_path
    if path is None:
        raise ConfigError("no tokenizer was given", "set model.tokenizer_path")
    return build_tokenizer(path)


def load_model(config: Config, tokenizer: Any) -> nn.Module:
    """Return the model of the ``model`` section, on the meta device.

    Raises:
        ConfigError: the tokenizer has tokens the model has no embedding for, or rows are longer than its positions.
    """
    from veomni.models import build_config, build_model, freeze

    section = config.model
    source = section.config_path or section.model_path
    if source is None:
        raise ConfigError("no model was given", "set model.config_path or model.model_path")
    overrides, trust = section.config_overrides, section.trust_remote_code
    architecture = build_config(source, overrides, trust_remote_code=trust)
    _refuse_mismatch(config, architecture.get_text_config(), tokenizer)
    model = build_model(
        architecture,
        attention=section.attention,
        experts=section.experts,
        weights=section.model_path or "random",
        trust_remote_code=trust,
    )
    if section.freeze:
        freeze(model, section.freeze)
    return model


def save_assets(config: Config, model: nn.Module, tokenizer: Any) -> None:
    """Write what explains the run's weights: resolved arguments, architecture and tokenizer; for one rank to call."""
    from veomni.models import unwrap

    output_dir = Path(config.train.output_dir)
    save_args(config, output_dir)
    tokenizer.save_pretrained(output_dir / "model_assets")
    unwrap(model).config.save_pretrained(output_dir / "model_assets")  # type: ignore[union-attr, operator]


def _refuse_mismatch(config: Config, architecture: Any, tokenizer: Any) -> None:
    if len(tokenizer) > architecture.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeds {architecture.vocab_size}",
            f"set model.config_overrides.vocab_size to {len(tokenizer)}, or take the model's own tokenizer",
        )
    longest = getattr(architecture, "max_position_embeddings", None)
    if longest is not None and config.data.max_seq_len > longest:
        raise ConfigError(
            f"data.max_seq_len is {config.data.max_seq_len}, the model has {longest} positions",
            f"set data.max_seq_len to at most {longest}",
        )


def load_batches(
    config: Config, dataset: TextDataset | Mixture, tokenizer: Any, launcher: Launcher, *, train: bool
) -> PackedDataLoader | StreamLoader:
    """Return the loader of this rank's micro-batches."""
    from veomni.data import build_dataloader

    data, section = config.data, config.train
    shard = launcher.sequence_shard
    endless = section.max_steps is not None and (data.stopping == "repeat" or not (data.streaming or data.sources))
    return build_dataloader(
        dataset,
        tokenizer,
        parallel=launcher.data_parallel,
        shard=shard,
        micro_batch_size=section.micro_batch_size,
        global_batch_size=section.global_batch_size,
        max_seq_len=data.max_seq_len,
        seed=section.seed,
        shuffle=data.shuffle,
        packing=data.packing,
        overlong=data.overlong,
        num_workers=data.num_workers,
        prefetch_factor=data.prefetch_factor,
        pin_memory=data.pin_memory,
        epochs=None if endless else section.num_train_epochs,
        cache_dir=data.cache_dir,
        chat_template=data.chat_template,
        train=train,
        balance=data.balance,
        stream_shards=data.stream_shards,
        lookahead=data.lookahead,
        max_media_tokens=data.max_media_tokens,
        samples=load_samples(config, dataset, tokenizer, shard) if dataset.data_type == "multimodal" else None,
    )


def create_optimizer(config: Config, model: nn.Module) -> Optimizer:
    """Return the optimizer of ``train.optimizer`` over the parameters of a model that has been set up."""
    from veomni.optim import build_optimizer

    return build_optimizer(model, **config.train.optimizer.model_dump())


def create_scheduler(config: Config, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """Return the schedule of ``train.scheduler`` over ``total_steps`` steps."""
    from veomni.optim import build_scheduler

    section = config.train.scheduler
    warmup = section.warmup_steps
    if warmup is None:
        warmup = int(total_steps * (section.warmup_ratio or 0.0))
    return build_scheduler(
        optimizer,
        name=section.name,
        total_steps=total_steps,
        warmup_steps=warmup,
        min_lr_ratio=section.min_lr_ratio,
        decay_ratio=section.decay_ratio,
        decay_shape=section.decay_shape,
    )


def total_steps(config: Config, loader: PackedDataLoader | StreamLoader) -> int:
    """Return the optimizer steps of the whole run.

    Raises:
        ConfigError: the data is read as a stream, whose length nobody knows, and ``train.max_steps`` is null.
    """
    if config.train.max_steps:
        return config.train.max_steps
    if loader.steps_per_epoch is None:
        problem = "the data is packed while it is read, and how many steps it makes is not known beforehand"
        raise ConfigError(problem, "set train.max_steps")
    return loader.steps_per_epoch * config.train.num_train_epochs
