"""Keys that contradict each other, found without looking at files, devices or the model."""

from __future__ import annotations

import math
from collections.abc import Iterator

from veomni.config.data import DataConfig
from veomni.config.media import MediaConfig
from veomni.config.model import ModelConfig
from veomni.config.problems import Problem
from veomni.config.train import TrainConfig
from veomni.config.train_parts import ExpertParallelConfig, MuonConfig, SchedulerConfig

_DOUBLE_PRECISION_ATTENTION = ("auto", "eager", "sdpa")
_ANY_PRECISION_ATTENTION = (*_DOUBLE_PRECISION_ATTENTION, "flex_attention")
_EXPERTS_ON = {"grouped_mm": ("cpu", "cuda"), "triton": ("cuda",), "npu": ("npu",)}
_BACKENDS = {"cpu": ("gloo",), "cuda": ("nccl", "gloo"), "npu": ("hccl", "gloo")}


def consistency_problems(model: ModelConfig, data: DataConfig, train: TrainConfig) -> Iterator[Problem]:
    """Yield every contradiction between keys."""
    yield from _sources(model)
    yield from _attention(model, train)
    yield from _experts(model, train)
    yield from _held_out(data, train)
    yield from _chat_template(data)
    yield from _media(data)
    yield from _streams(data, train)
    yield from _length(train)
    yield from _decay(train)
    yield from _optimizer(train)
    yield from _devices(train)
    yield from _sharding(train)
    yield from _expert_parallel(train)


def _sources(model: ModelConfig) -> Iterator[Problem]:
    if model.config_path is None and model.model_path is None:
        yield Problem("model.config_path and model.model_path are both null", "set one: it names the architecture")
    if model.broadcast_weights and model.model_path is None:
        yield Problem("model.broadcast_weights is true without model.model_path", "set it to false: nothing is read")
    if model.train_tokenizer_vocab_size is None:
        return
    for key in ("tokenizer_path", "model_path"):
        if getattr(model, key) is not None:
            yield Problem(f"model.train_tokenizer_vocab_size and model.{key} both give a tokenizer", "set one to null")


def _attention(model: ModelConfig, train: TrainConfig) -> Iterator[Problem]:
    allowed = _DOUBLE_PRECISION_ATTENTION if train.precision == "fp64" else _ANY_PRECISION_ATTENTION
    if train.precision != "bf16" and model.attention not in allowed:
        yield Problem(
            f"model.attention {model.attention} does not compute in {train.precision}",
            f"use one of {', '.join(allowed)}, or train.precision bf16",
        )
    elif train.accelerator == "cpu" and model.attention not in _ANY_PRECISION_ATTENTION:
        yield Problem(f"model.attention {model.attention} does not run on the CPU", "use auto, eager or sdpa")


def _experts(model: ModelConfig, train: TrainConfig) -> Iterator[Problem]:
    if model.experts in ("auto", "loop"):
        return
    if train.precision != "bf16":
        yield Problem(
            f"model.experts {model.experts} does not compute in {train.precision}",
            "use auto or loop, or train.precision bf16",
        )
    elif train.accelerator not in (None, "auto", *_EXPERTS_ON[model.experts]):
        yield Problem(
            f"model.experts {model.experts} does not run on accelerator {train.accelerator}", "use auto or loop"
        )


def _held_out(data: DataConfig, train: TrainConfig) -> Iterator[Problem]:
    if data.eval_path is not None and data.eval_fraction:
        yield Problem("data.eval_path and data.eval_fraction both choose held-out data", "set data.eval_fraction to 0")
    of_sources = [number for number, source in enumerate(data.sources) if source.eval_path is not None]
    if of_sources and data.eval_path is not None:
        yield Problem(f"data.eval_path and data.sources.{of_sources[0]}.eval_path both name held-out data", "give one")
    if train.eval.every_steps is not None and not (data.eval_path or data.eval_fraction or of_sources):
        yield Problem(
            "train.eval.every_steps is set but there is no held-out data",
            "set data.eval_path, data.eval_fraction or the eval_path of a source, or train.eval.every_steps to null",
        )


def _chat_template(data: DataConfig) -> Iterator[Problem]:
    renders = {"conversation", "multimodal", "preference"}
    if data.chat_template is not None and not renders & _data_types(data):
        yield Problem(
            f"data.chat_template has no meaning with data.data_type {data.data_type}",
            "leave it out, or set data.data_type to conversation or multimodal",
        )
    if data.format != "messages" and not {"conversation", "multimodal"} & _data_types(data):
        yield Problem(
            f"data.format {data.format} has no meaning with data.data_type {data.data_type}",
            "leave it out, or set data.data_type to conversation or multimodal",
        )


def _media(data: DataConfig) -> Iterator[Problem]:
    default = MediaConfig()
    changed = [name for name in MediaConfig.model_fields if getattr(data.media, name) != getattr(default, name)]
    if changed and "multimodal" not in _data_types(data):
        yield Problem(
            f"data.media.{changed[0]} has no meaning with data.data_type {data.data_type}",
            "leave it out, or set data.data_type to multimodal",
        )


def _data_types(data: DataConfig) -> set[str]:
    """Return the types of all data that is trained on."""
    return {source.data_type or data.data_type for source in data.sources} or {data.data_type}


def _streams(data: DataConfig, train: TrainConfig) -> Iterator[Problem]:
    if data.train_path is None and not data.sources:
        yield Problem("data.train_path is missing, and so is data.sources", "give --data.train_path VALUE")
    if data.train_path is not None and data.sources:
        yield Problem("data.train_path and data.sources both name the training data", "give one of them")
    names = [source.name for source in data.sources]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Problem(f"data.sources: two sources are called {name!r}", "give each a name of its own")
    if data.sources and not any(source.weight for source in data.sources):
        yield Problem("data.sources: the weights sum to zero", "give one source a weight above 0")
    if not (data.streaming or data.sources):
        return
    if train.max_steps is None:
        yield Problem("a stream does not say how long it is, and train.max_steps is null", "set train.max_steps")
    for key, given in (("eval_fraction", data.eval_fraction), ("max_documents", data.max_documents)):
        if given:
            yield Problem(
                f"data.{key} chooses documents by number, and a stream does not number them", "use data.eval_path"
            )


def _length(train: TrainConfig) -> Iterator[Problem]:
    schedule = train.scheduler
    if schedule.warmup_steps is not None and schedule.warmup_ratio is not None:
        yield Problem("train.scheduler.warmup_steps and warmup_ratio are both set", "set one of them to null")
    if schedule.warmup_steps and train.max_steps is not None and schedule.warmup_steps > train.max_steps:
        yield Problem(
            f"train.scheduler.warmup_steps {schedule.warmup_steps} is more than train.max_steps {train.max_steps}",
            "warm up in fewer steps, or use train.scheduler.warmup_ratio",
        )


def _decay(train: TrainConfig) -> Iterator[Problem]:
    schedule, default = train.scheduler, SchedulerConfig()
    for key in ("decay_ratio", "decay_shape"):
        value = getattr(schedule, key)
        if schedule.name != "wsd" and value != getattr(default, key):
            problem = f"train.scheduler.{key} {value} has no meaning with train.scheduler.name {schedule.name}"
            yield Problem(problem, "leave it out, or set train.scheduler.name to wsd")
    warmup = schedule.warmup_ratio or (schedule.warmup_steps or 0) / (train.max_steps or math.inf)
    if schedule.name == "wsd" and warmup + schedule.decay_ratio > 1:
        problem = f"the warm-up and train.scheduler.decay_ratio {schedule.decay_ratio} are more than the whole run"
        yield Problem(problem, "warm up in fewer steps, or decay in a smaller share of them")


def _optimizer(train: TrainConfig) -> Iterator[Problem]:
    optimizer = train.optimizer
    if optimizer.name == "muon":
        if train.data_parallel_mode == "fsdp1":
            yield Problem(
                "train.optimizer.name muon needs the rows and columns of matrices, and train.data_parallel_mode fsdp1 "
                "keeps flat pieces of them",
                "use fsdp2, ddp or single, or train.optimizer.name adamw",
            )
    elif optimizer.muon != MuonConfig():
        yield Problem(
            f"train.optimizer.muon has no meaning with train.optimizer.name {optimizer.name}",
            "leave it out, or set train.optimizer.name to muon",
        )


def _devices(train: TrainConfig) -> Iterator[Problem]:
    if train.data_parallel_mode == "single" and train.devices not in ("auto", 1):
        yield Problem(
            f"train.data_parallel_mode single runs in one process, but train.devices is {train.devices}",
            "set train.devices to 1, or train.data_parallel_mode to ddp, fsdp1 or fsdp2",
        )
    backends = _BACKENDS.get(train.accelerator, ())
    if train.backend != "auto" and backends and train.backend not in backends:
        problem = f"train.backend {train.backend} does not serve train.accelerator {train.accelerator}"
        yield Problem(problem, f"use auto or {' or '.join(backends)}")


def _sharding(train: TrainConfig) -> Iterator[Problem]:
    mode, fsdp = train.data_parallel_mode, train.fsdp
    only = {
        "sharding": (fsdp.sharding != "full", ("fsdp1",)),
        "reshard_after_forward": (not fsdp.reshard_after_forward, ("fsdp2",)),
        "reshard_after_backward": (not fsdp.reshard_after_backward, ("fsdp2",)),
        "cpu_offload": (fsdp.cpu_offload, ("fsdp1", "fsdp2")),
        "prefetch": (fsdp.prefetch > 0, ("fsdp1", "fsdp2")),
        "reduce_dtype": (fsdp.reduce_dtype != "fp32", ("fsdp1", "fsdp2")),
    }
    for key, (changed, modes) in only.items():
        if changed and mode not in modes:
            problem = f"train.fsdp.{key} {getattr(fsdp, key)} has no meaning with train.data_parallel_mode {mode}"
            yield Problem(problem, f"leave it out, or use {' or '.join(modes)}")
    if fsdp.sharding == "hybrid" and train.data_parallel_replicate_size == 1:
        yield Problem(
            "train.fsdp.sharding hybrid has one replica", "set train.data_parallel_replicate_size to 2 or more"
        )
    if fsdp.prefetch > 1 and mode == "fsdp1":
        yield Problem(f"train.fsdp.prefetch {fsdp.prefetch} is more than fsdp1 can", "set it to 0 or 1, or use fsdp2")
    if fsdp.reduce_dtype == "bf16" and train.precision != "bf16":
        problem = f"train.fsdp.reduce_dtype bf16 has no meaning with train.precision {train.precision}"
        yield Problem(problem, "leave it out, or set train.precision to bf16")


def _expert_parallel(train: TrainConfig) -> Iterator[Problem]:
    if train.expert_parallel_size == 1 and train.expert_parallel != ExpertParallelConfig():
        changed = train.expert_parallel.model_dump(exclude_defaults=True)
        names = ", ".join(f"train.expert_parallel.{key} {value}" for key, value in changed.items())
        yield Problem(f"{names} has no meaning with train.expert_parallel_size 1", "leave it out, or use a larger size")
