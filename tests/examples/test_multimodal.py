"""The vision-language and omni examples as people run them: layouts agree, runs go on, something is learned."""

from __future__ import annotations

import json
import runpy
import shutil
import sys

import pytest

from tests.examples.script import ROOT, agree, rows
from veomni.testing.ranks import run_ranks

STEPS = {
    "train.precision": "fp64", "train.max_steps": 4, "data.max_seq_len": 128, "train.eval.every_steps": 2,
    "train.eval.max_batches": 2, "train.logging.plot": "false", "train.accelerator": "cpu",
    "train.checkpoint.keep_last": 5,
}  # fmt: skip
ALONE = {"train.data_parallel_mode": "single", "train.devices": 1}
FOUR = {"train.data_parallel_mode": "fsdp2", "train.ulysses_parallel_size": 2, "train.devices": 4}
NAMES = ("vlm", "omni")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    import transformers.models.qwen3_vl.modeling_qwen3_vl  # forked ranks need not repeat it
    import transformers.models.siglip.modeling_siglip  # noqa: F401

    return tmp_path_factory.mktemp("cache")


def script(name, *arguments):
    sys.argv = ["train.py", str(ROOT / f"configs/multimodal/tiny_{name}.yaml"), *arguments]
    runpy.run_path(str(ROOT / "examples" / sys.argv[0]), run_name="__main__")


def train(name, cache, output_dir, layout, **options):
    paths = {
        "model.config_path": ROOT / f"configs/model_configs/{'tiny_qwen3_vl' if name == 'vlm' else 'tiny_omni'}.json",
        "data.cache_dir": cache, "train.output_dir": output_dir,
    }  # fmt: skip
    given = {**paths, **STEPS, **layout, **options}
    run_ranks(
        script, layout["train.devices"], name, *(f"--{key}={value}" for key, value in given.items()), init=False,
        timeout=240,
    )  # fmt: skip
    return rows(output_dir)


@pytest.fixture(scope="module", params=NAMES)
def alone(request, cache, tmp_path_factory):
    """Four steps of one process, saved after two."""
    output_dir = tmp_path_factory.mktemp(request.param)
    steps = train(request.param, cache, output_dir, ALONE, **{"train.checkpoint.save_steps": 2})
    return request.param, output_dir, steps


def same(found, expected):
    agree(found, expected, 1e-9)
    for left, right in zip(found, expected, strict=True):
        told = {key: value for key, value in right.items() if key.startswith(("eval_", "source_", "loss_"))}
        numbers = {key: value for key, value in told.items() if value is not None}  # a source may have no token in it
        assert {key: left[key] for key in numbers} == pytest.approx(numbers, rel=1e-9), left["step"]
        assert all(left[key] is None for key in told.keys() - numbers.keys())


def test_four_ranks_that_share_rows_train_as_one_does(alone, cache, tmp_path):
    name, _, expected = alone
    same(train(name, cache, tmp_path, FOUR, **{"data.num_workers": 1}), expected)
    assert {"eval_loss", "eval_accuracy"} <= expected[-1].keys()
    if name == "omni":
        parts = {"loss_text", "loss_codes", "eval_loss_codes"}
        assert parts | {"eval_accuracy/digits", "eval_accuracy/tones", "source_loss/words"} <= expected[-1].keys()


def test_a_run_goes_on_on_four_ranks(alone, cache, tmp_path):
    name, output_dir, expected = alone
    shutil.copytree(output_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/global_step_4")
    same(train(name, cache, tmp_path / "run", FOUR), expected)


def test_what_is_exported_is_read_again(alone, cache):
    import torch
    from transformers import AutoModelForImageTextToText

    name, output_dir, _ = alone
    exported = output_dir / "hf"
    assert (exported / "tokenizer.json").is_file()
    if name == "vlm":
        model = AutoModelForImageTextToText.from_pretrained(exported)
        assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
        return
    from veomni.models import build_model

    parts = {path.parent.name for path in exported.glob("**/model.safetensors")}
    assert parts == {"foundation", "image_encoder", "image_projector", "audio_encoder", "audio_projector", "codes"}
    assert json.loads((exported / "config.json").read_text())["image_token_id"] == 6
    assert all(parameter.device == torch.device("meta") for parameter in build_model(str(exported)).parameters())


def test_digits_are_learned(cache, tmp_path):
    """A quarter of the configuration's steps; the whole run is in docs/multimodal.md."""
    found = train(
        "vlm", cache, tmp_path, ALONE,
        **{"train.precision": "fp32", "train.max_steps": 75, "data.max_seq_len": 512, "train.eval.max_batches": "null",
           "train.eval.every_steps": 75, "train.export.hf": "false", "train.checkpoint.save_final": "false"},
    )  # fmt: skip
    assert found[-1]["eval_accuracy"] > 0.8
