"""``veomni export`` on what the example script leaves behind, against the script's own export and PyTorch's reader."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.examples.script import SMALL, train
from veomni.cli import main
from veomni.errors import EXIT_BAD_INPUT

OPTIONS = {
    **SMALL,
    "train.precision": "fp32",
    "train.max_steps": 4,
    "train.eval.every_steps": "null",
    "train.checkpoint.save_steps": 2,
    "train.logging.plot": "false",
}


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that saved at steps 2 and 4 and exported at its end; not to be changed."""
    corpus = tmp_path_factory.mktemp("corpus")
    for name in ("errors", "launcher", "logging", "registry"):
        shutil.copy(Path(__file__).parents[2] / "veomni" / f"{name}.py", corpus / f"{name}.txt")
    output_dir = tmp_path_factory.mktemp("run") / "output"
    train(corpus, output_dir, 2, "fsdp2", OPTIONS)
    return output_dir


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_the_last_checkpoint_is_what_the_run_exported(output_dir: Path, tmp_path: Path) -> None:
    checkpoint, exported = output_dir / "checkpoints" / "global_step_4", tmp_path / "new" / "exported"
    command = [sys.executable, "-c", "from veomni.cli import main; main()", "export", str(checkpoint), str(exported)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{exported}\n"
    assert_same_bits(tensors(exported), tensors(output_dir / "hf"))
    files = {path.name for path in (output_dir / "hf").iterdir()}
    assert {path.name for path in exported.iterdir()} == files
    assert {"tokenizer.json", "tokenizer_config.json", "config.json"} <= files
    for name in files - {"model.safetensors"}:
        assert (exported / name).read_bytes() == (output_dir / "hf" / name).read_bytes(), name
    assert sorted(path.name for path in exported.parent.iterdir()) == ["exported"]


def test_transformers_reads_it(output_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    main(["export", str(output_dir / "checkpoints" / "global_step_4"), str(tmp_path / "exported")])
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = AutoTokenizer.from_pretrained(tmp_path / "exported")("def build(", return_tensors="pt")
    expected = AutoModelForCausalLM.from_pretrained(output_dir / "hf")(**inputs).logits
    assert expected.shape[1] > 1
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("step", [2, 4])
def test_every_step_is_exported_as_pytorch_reads_it(output_dir: Path, tmp_path: Path, step: int) -> None:
    checkpoint = output_dir / "checkpoints" / f"global_step_{step}"
    dcp_to_torch_save(checkpoint / "weights", tmp_path / "weights.pt")
    saved = torch.load(tmp_path / "weights.pt", weights_only=True)
    main(["export", str(checkpoint), str(tmp_path / "exported"), "--dtype", "bfloat16"])
    found = tensors(tmp_path / "exported")
    read = {key.removeprefix("model."): value.bfloat16() for key, value in saved.items() if key.startswith("model.")}
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same_bits(found, {name: read[name] for name in found})
    assert read.keys() - found.keys() <= {"lm_head.weight"}  # tied
    embedded = tensors(output_dir / "hf")["model.embed_tokens.weight"].bfloat16()
    assert torch.equal(found["model.embed_tokens.weight"], embedded) == (step == 4)


def flip(checkpoint: Path) -> None:
    path = max((checkpoint / "weights").glob("__1_*"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


BREAK = {
    "no such step": ("global_step_9", lambda run: None, "global_step_9"),
    "a flipped bit": ("global_step_4", lambda run: flip(run / "checkpoints/global_step_4"), "have changed"),
    "a missing file": (
        "global_step_4",
        lambda run: (run / "checkpoints/global_step_4/weights/.metadata").unlink(),
        ".metadata is missing",
    ),
    "no manifest": (
        "global_step_4",
        lambda run: (run / "checkpoints/global_step_4/manifest.json").unlink(),
        "manifest",
    ),
    "not a checkpoint": ("../hf", lambda run: None, "hf"),
    "no architecture": ("global_step_4", lambda run: (run / "model_assets/config.json").unlink(), "no config.json"),
    "a broken architecture": (
        "global_step_4",
        lambda run: (run / "model_assets/config.json").write_text("{"),
        "config.json",
    ),
    "another architecture": (
        "global_step_4",
        lambda run: (run / "model_assets/config.json").write_text(
            (run / "model_assets/config.json").read_text().replace('"hidden_size": 48', '"hidden_size": 32')
        ),
        "does not fit the model",
    ),
    "no tokenizer": ("global_step_4", lambda run: (run / "model_assets/tokenizer.json").unlink(), "tokenizer"),
}


def tree(directory: Path) -> list[str]:
    return sorted(str(path) for path in directory.rglob("*"))


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["export", *arguments])
    printed = capsys.readouterr()
    assert caught.value.code == EXIT_BAD_INPUT
    assert "fix: " in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    return printed.err


@pytest.mark.parametrize("case", BREAK)
def test_a_checkpoint_that_cannot_be_exported_ends_with_78_and_writes_nothing(
    output_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    name, spoil, said = BREAK[case]
    run = shutil.copytree(output_dir, tmp_path / "run")
    spoil(run)
    before = tree(tmp_path)
    assert said in refused([str(run / "checkpoints" / name), str(tmp_path / "a" / "b" / "exported")], capsys)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("case", ["a file", "something else", "no such dtype", "no argument"])
def test_a_place_that_cannot_be_written_to_is_rejected_and_kept(
    output_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    checkpoint, target = str(output_dir / "checkpoints" / "global_step_4"), tmp_path / "exported"
    arguments = [checkpoint, str(target)]
    if case == "a file":
        target.write_text("mine")
    elif case == "something else":
        target.mkdir()
        (target / "notes").write_text("mine")
    elif case == "no such dtype":
        arguments += ["--dtype", "int8"]
    else:
        arguments = [checkpoint]
    before = tree(tmp_path)
    refused(arguments, capsys)
    assert tree(tmp_path) == before
    assert all(path.read_text() == "mine" for path in tmp_path.rglob("*") if path.is_file())
