"""Configurations and command lines that cannot work: rejected with the key and the fix, with exit code 78."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.config.samples import write
from veomni.errors import EXIT_BAD_INPUT, InputError, LayoutError
from veomni.run_config import check_layout, load_config

# Changes to the file, arguments after it, what the problem says, what the fix says.
SOURCE = {"path": ".", "name": "a", "weight": 1.0}
MIXED = {"data.train_path": None, "data.sources": [SOURCE], "train.max_steps": 1}

CASES: dict[str, tuple[dict[str, Any], list[str], str, str]] = {
    "unknown key": ({"train.max_step": 3}, [], "train.max_step (", "did you mean 'max_steps'"),
    "unknown key of a group": (
        {"train.optimizer.learning_rate": 1.0}, [], "train.optimizer.learning_rate", "use one of",
    ),
    "key in the wrong group": ({"train.lr": 1.0}, [], "train.lr", "'train.optimizer.lr'"),
    "unknown section": ({"trian": {}}, [], "trian", "did you mean 'train'"),
    "unknown flag": ({}, ["--train.sed", "1"], "train.sed (--train.sed)", "did you mean 'seed'"),
    "a string for an integer": ({"train.seed": "abc"}, [], "train.seed", "valid integer"),
    "a quoted number": ({"train.max_steps": "3"}, [], "train.max_steps", "valid integer"),
    "a bool for an integer": ({"train.seed": True}, [], "train.seed", "valid integer"),
    "a float for an integer": ({}, ["--train.max_steps", "1.5"], "train.max_steps", "valid integer"),
    "a number for a string": ({"data.text_key": 3}, [], "data.text_key", "a string, in quotes"),
    "no for a bool": ({}, ["--train.compile", "no"], "train.compile", "valid boolean"),
    "not a number": ({}, ["--train.optimizer.lr", ".nan"], "train.optimizer.lr", "finite"),
    "infinite lr": ({}, ["--train.optimizer.lr", "1e999"], "train.optimizer.lr", "finite"),
    "a list for a group": ({"train.optimizer": []}, [], "train.optimizer", "mapping"),
    "an empty section": ({"train": None}, [], "train", "mapping"),
    "a missing key": ({"data": {}}, [], "data.train_path is missing", "--data.train_path VALUE"),
    "an unknown choice": ({"train.data_parallel_mode": "fsdp3"}, [], "train.data_parallel_mode", "'fsdp2'"),
    "an unknown precision": ({"train.precision": "fp16"}, [], "train.precision", "'bf16'"),
    "a negative seed": ({}, ["--train.seed", "-1"], "train.seed", "greater than or equal to 0"),
    "an axis of size 0": (
        {"train.tensor_parallel_size": 0}, [], "train.tensor_parallel_size", "greater than or equal to 1",
    ),
    "one beta": ({"train.optimizer.betas": [0.9]}, [], "train.optimizer.betas", "at least 2"),
    "one kept checkpoint": ({"train.checkpoint.keep_last": 1}, [], "train.checkpoint.keep_last", "equal to 2"),
    "no training data": ({"data.train_path": []}, [], "data.train_path", "at least 1"),
    "all data held out": ({"data.eval_fraction": 1.0}, [], "data.eval_fraction", "less than 1"),
    "a flag without a value": ({}, ["--train.compile"], "--train.compile has no value", "--train.compile VALUE"),
    "a flag before a flag": ({}, ["--train.seed", "--train.compile", "true"], "--train.seed has no value", "give one"),
    "an empty value": ({}, ["--data.eval_path="], "--data.eval_path has an empty value", "null"),
    "contradicting flags": ({}, ["--train.seed", "1", "--train.seed=2"], "--train.seed is given twice", "keep one"),
    "a flag inside a flag": ({}, ["--train.optimizer", "{lr: 1}", "--train.optimizer.lr", "2"], "both set", "put all"),
    "a flag inside a value": ({}, ["--train.output_dir.x", "1"], "train.output_dir is 'out'", "set --train.output_dir"),
    "a single dash": ({}, ["-x", "1"], "'-x' is not an override", "usage"),
    "two files": ({}, ["b.yaml"], "more than one file", "usage"),
    "broken YAML in a flag": ({}, ["--data.text_key", "[a"], "--data.text_key:1", "quotes"),
    "no architecture": ({"model.config_path": None}, [], "model.config_path and model.model_path", "set one"),
    "nothing to broadcast": ({"train.broadcast_weights": True}, [], "train.broadcast_weights", "false"),
    "two tokenizers": ({"model.tokenizer_path": "."}, [], "model.train_tokenizer_vocab_size", "one to null"),
    "no tokenizer": ({"model.train_tokenizer_vocab_size": None}, [], "tokenizer", "model.tokenizer_path"),
    "a vocabulary without all bytes": ({"model.train_tokenizer_vocab_size": 200}, [], "vocab_size", "equal to 269"),
    "fp64 with a flash kernel": (
        {}, ["--train.precision", "fp64", "--model.attention", "flash_attention_2"], "fp64", "sdpa",
    ),
    "fp32 with varlen": ({"model.attention": "varlen"}, [], "model.attention varlen", "train.precision bf16"),
    "a CUDA kernel on the CPU": (
        {"model.attention": "varlen", "train.precision": "bf16", "train.accelerator": "cpu"}, [], "accelerator cpu",
        "sdpa",
    ),
    "fp64 with grouped products": (
        {"model.experts": "grouped_mm", "train.precision": "fp64"}, [], "model.experts grouped_mm", "loop",
    ),
    "experts of another device": (
        {"model.experts": "npu", "train.precision": "bf16", "train.accelerator": "cpu"}, [], "accelerator cpu", "auto",
    ),
    "evaluation without data": ({"train.eval.every_steps": 5}, [], "train.eval.every_steps", "data.eval_fraction"),
    "a chat template for plain text": ({"data.chat_template": "chatml"}, [], "data.chat_template", "conversation"),
    "a format for plain text": ({"data.format": "sharegpt"}, [], "data.format sharegpt", "data.data_type"),
    "an unknown format": ({"data.format": "share"}, [], "data.format", "'sharegpt'"),
    "two ways to name data": (
        {"data.sources": [SOURCE], "train.max_steps": 1}, [], "data.train_path and data.sources", "give one",
    ),
    "two sources of one name": (
        MIXED | {"data.sources": [SOURCE, dict(SOURCE)]}, [], "two sources are called 'a'", "own",
    ),
    "weights that sum to zero": (
        MIXED | {"data.sources": [{**SOURCE, "weight": 0.0}]}, [], "the weights sum to zero", "above 0",
    ),
    "a negative weight": (
        MIXED | {"data.sources": [{**SOURCE, "weight": -1.0}]}, [], "data.sources.0.weight", "greater than or equal",
    ),
    "a source without a name": (MIXED | {"data.sources": [{"path": "."}]}, [], "data.sources.0.name is", "entry"),
    "a name with a slash": (MIXED | {"data.sources": [{**SOURCE, "name": "a/b"}]}, [], "data.sources.0.name", ""),
    "an unknown key of a source": (
        MIXED | {"data.sources": [{**SOURCE, "wieght": 1.0}]}, [], "data.sources.0.wieght", "",
    ),
    "a source that is not there": (
        MIXED | {"data.sources": [{**SOURCE, "path": "nowhere"}]}, [], "data.sources.0.path: nowhere", "give",
    ),
    "held-out data named twice": (
        MIXED | {"data.eval_path": ".", "data.sources": [{**SOURCE, "eval_path": "."}]}, [],
        "data.sources.0.eval_path both name held-out data", "give one",
    ),
    "held-out data of a source that is not there": (
        MIXED | {"data.sources": [{**SOURCE, "eval_path": "nowhere"}]}, [], "data.sources.0.eval_path: nowhere", "give",
    ),
    "a mixture without an end": (MIXED | {"train.max_steps": None}, [], "length of a stream is unknown", "max_steps"),
    "a held-out share of a stream": (
        {"data.streaming": True, "train.max_steps": 1, "data.eval_fraction": 0.1}, [], "eval_fraction", "eval_path",
    ),
    "the first of a stream": (
        {"data.streaming": True, "train.max_steps": 1, "data.max_documents": 5}, [], "data.max_documents", "eval_path",
    ),
    "URLs without media": ({"data.media": {"url_hosts": ["a"]}}, [], "data.media.url_hosts", "multimodal"),
    "two held-out sets": (
        {"data.eval_path": ".", "data.eval_fraction": 0.1}, [], "data.eval_path", "data.eval_fraction",
    ),
    "overlap alone": ({"train.ulysses.overlap": True}, [], "train.ulysses.overlap True has no meaning", "larger size"),
    "two warm-ups": ({"train.scheduler": {"warmup_steps": 1, "warmup_ratio": 0.1}}, [], "warmup_ratio", "null"),
    "a warm-up longer than the run": (
        {"train.scheduler.warmup_steps": 9, "train.max_steps": 5}, [], "train.scheduler.warmup_steps 9", "fewer",
    ),
    "a decay of a schedule that has none": (
        {"train.scheduler.decay_ratio": 0.2}, [], "train.scheduler.decay_ratio", "choose a component",
    ),
    "a warm-up and a decay longer than the run": (
        {"train.scheduler": {"name": "wsd", "warmup_steps": 8, "decay_ratio": 0.5}, "train.max_steps": 10},
        [], "decay_ratio 0.5", "warm up in fewer",
    ),
    "all steps decay twice": (
        {"train.scheduler": "wsd"}, ["--train.scheduler.decay_ratio", "2"], "train.scheduler.decay_ratio", "equal to 1",
    ),
    "an optimizer there is not": ({"train.optimizer": "lion"}, [], "train.optimizer", "'muon'"),
    "muon's keys for adamw": ({"train.optimizer.ns_steps": 3}, [], "train.optimizer.ns_steps", "choose a component"),
    "muon on flat shards": (
        {"train.optimizer.name": "muon", "train.data_parallel_mode": "fsdp1"},
        [], "train.data_parallel_mode fsdp1", "fsdp2",
    ),
    "single on two devices": (
        {"train.devices": 2, "train.data_parallel_mode": "single"}, [], "train.devices is 2", "train.devices to 1",
    ),
    "nccl on the CPU": ({"train.backend": "nccl", "train.accelerator": "cpu"}, [], "train.backend nccl", "gloo"),
    "fsdp1's sharding with fsdp2": ({"train.strategy.sharding": "grad_op"}, [], "train.strategy.sharding", "choose a"),
    "fsdp2's switch with fsdp1": (
        {"train.strategy.reshard_after_forward": False, "train.data_parallel_mode": "fsdp1"},
        [], "train.strategy.reshard_after_forward", "choose a component",
    ),
    "offload with ddp": (
        {"train.strategy.cpu_offload": True, "train.data_parallel_mode": "ddp"}, [], "train.strategy.cpu_offload", "ch",
    ),
    "a strategy that holds no parameters": (
        {"train.data_parallel_mode": "ulysses"}, [], "train.data_parallel_mode", "holds parameters",
    ),
    "a name that changed": ({"train.gradient_checkpointing": "full"}, [], "is not a key", "train.activation_checkp"),
    "a group that changed": ({"train.moe": {"z_loss_coef": 0.1}}, [], "train.moe", "train.router"),
    "a key in a group that changed": ({"model.fused_loss": True}, [], "model.fused_loss", "it is now train.fused_loss"),
    "bf16 sums of fp32 gradients": ({"train.reduce_dtype": "bf16"}, [], "train.reduce_dtype", "precision"),
    "missing training data": (
        {"data.train_path": "nowhere.jsonl"}, [], "data.train_path: nowhere.jsonl", "relative to",
    ),
    "missing data in a list": ({"data.train_path": ["python-stdlib", "gone"]}, [], "data.train_path: gone", "does"),
    "missing held-out data": ({"data.eval_path": "gone"}, [], "data.eval_path: gone", "--data.eval_path"),
    "missing weights": (
        {"model.model_path": "org/model", "model.train_tokenizer_vocab_size": None},
        [], "model.model_path", "config.json",
    ),
    "weights that are a file": (
        {"model.model_path": __file__, "model.train_tokenizer_vocab_size": None}, [], "is a file", "directory",
    ),
    "missing architecture": ({"model.config_path": "no/config.json"}, [], "model.config_path: no/config.json", "does"),
    "output below a file": ({"train.output_dir": f"{__file__}/out"}, [], "is not a directory", "--train.output_dir"),
    "output that is a file": ({"train.output_dir": __file__}, [], "is not a directory", "--train.output_dir"),
    "output on the network": ({"train.output_dir": "s3://bucket/x"}, [], "train.output_dir: s3:", "mounted"),
    "missing checkpoint": ({"train.checkpoint.resume": "gone"}, [], "train.checkpoint.resume: gone", "auto or none"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_naming_the_key_and_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    changes, arguments, problem, fix = CASES[case]
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.yaml", changes)
    with pytest.raises(InputError) as caught:
        load_config([str(path), *arguments])
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert problem in caught.value.problem
    assert fix in caught.value.fix
    assert list(tmp_path.iterdir()) == [path], "nothing may be written"


def test_no_file_is_refused() -> None:
    with pytest.raises(InputError, match="no configuration file"):
        load_config(["--train.seed", "1"])


def test_everything_that_is_wrong_is_said_at_once_and_where(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", {"train.max_step": 3, "data.max_seq_len": "x"})
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "max_step" in text)
    with pytest.raises(InputError) as caught:
        load_config([str(path), "--train.seed", "y"])
    for said in (
        "3 problems",
        f"train.max_step ({path}:{line})",
        "data.max_seq_len",
        "train.seed (--train.seed) is 'y'",
    ):
        assert said in caught.value.problem


def test_the_value_of_an_unknown_key_is_not_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", {"train.logging.wandb_api_key": "s3cret"})
    with pytest.raises(InputError) as caught:
        load_config([str(path)])
    assert "wandb_api_key" in str(caught.value)
    assert "s3cret" not in str(caught.value)


# Changes, ranks, what the problem says, what the fix says.
LAYOUTS: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "tensor": ({"train.tensor_parallel_size": 2}, 2, "train.tensor_parallel_size is 2", "set it to 1"),
    "experts over 3 ranks": (
        {"train.expert_parallel_size": 2}, 3, "expert parallel size 2 does not divide the 3 ranks", "a divisor of 3",
    ),
    "experts over replicas": (
        {"train.expert_parallel_size": 4, "train.data_parallel_replicate_size": 3}, 6,
        "expert parallel size 4 does not divide the 2 ranks", "a divisor of 2",
    ),
    "experts with ddp": (
        {"train.expert_parallel_size": 2, "train.data_parallel_mode": "ddp"}, 3,
        "expert parallel size 2 does not divide the 3 ranks", "a divisor of 3",
    ),
    "ulysses": ({"train.ulysses_parallel_size": 4}, 2, "not a multiple of 4", "start a multiple of 4 ranks"),
    "context": ({"train.context_parallel_size": 4}, 2, "train.context_parallel_size 4", "start a multiple of 4 ranks"),
        "single": ({"train.data_parallel_mode": "single"}, 2, "single was given 2 ranks", "start one process"),
    "replicas with ddp": (
        {"train.data_parallel_mode": "ddp", "train.data_parallel_replicate_size": 2}, 2, "replicate_size 2", "fsdp2",
    ),
    "world": ({"train.data_parallel_replicate_size": 2}, 3, "3 ranks are not a multiple of 2", "train.devices"),
    "batch": ({"train.micro_batch_size": 3}, 1, "train.global_batch_size 8", "to 9"),
    "batch over ranks": ({}, 3, "3 data ranks", "train.global_batch_size to 9"),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_layout_that_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    changes, world, problem, fix = LAYOUTS[case]
    config = load_config([str(write(tmp_path / "a.yaml", {"train.output_dir": str(tmp_path), **changes}))])
    with pytest.raises(LayoutError) as caught:
        check_layout(config, world)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert problem in caught.value.problem
    assert fix in caught.value.fix
