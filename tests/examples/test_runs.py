"""Options of a run, through the example script: none of them may change what is learnt, or what is exported."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.examples.script import SHORT, agree, rows, train

IMPORTING = {
    "model.config_path": "null",
    "model.config_overrides": "{}",
    "model.train_tokenizer_vocab_size": "null",
}
HALF_GATHERED = {"train.strategy.reshard_after_forward": "false", "train.strategy.prefetch": 1}


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory):
    """The rows of one process without any option, and the model it exported."""
    output_dir = tmp_path_factory.mktemp("plain")
    return train(corpus, output_dir, 1, "single", {**SHORT, "train.export.hf": "true"}), output_dir / "hf"


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("fsdp2", {"train.strategy.cpu_offload": "true", "train.activation_checkpointing": "full"}),
        ("fsdp2", {**HALF_GATHERED, "train.activation_checkpointing": "selective"}),
        ("fsdp1", {"train.strategy.sharding": "grad_op", "train.activation_checkpointing": "full"}),
        ("fsdp1", {"train.strategy.cpu_offload": "true"}),
        ("ddp", {"train.activation_memory": "64 MiB", "train.micro_batch_size": 1}),
    ],
    ids=str,
)
def test_an_option_changes_no_loss(corpus, tmp_path, plain, mode, options):
    agree(train(corpus, tmp_path, 2, mode, {**SHORT, **options}), plain[0], 1e-9)


@pytest.mark.parametrize("mode", ["ddp", "fsdp1", "fsdp2"])
def test_every_layout_exports_the_same_model(corpus, tmp_path, plain, mode):
    train(corpus, tmp_path, 2, mode, {**SHORT, "train.export.hf": "true"})
    expected, found = (load_file(folder / "model.safetensors") for folder in (plain[1], tmp_path / "hf"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("broadcast", ["false", "true"])
@pytest.mark.parametrize("mode", ["ddp", "fsdp1", "fsdp2"])
def test_an_exported_model_is_imported_bit_by_bit(corpus, tmp_path, plain, mode, broadcast):
    weights = {"model.model_path": plain[1], "train.broadcast_weights": broadcast}
    still = {"train.max_steps": 1, "train.optimizer.lr": 0, "train.export.hf": "true"}
    train(corpus, tmp_path, 2, mode, {**SHORT, **IMPORTING, **weights, **still})
    expected, found = (load_file(folder / "model.safetensors") for folder in (plain[1], tmp_path / "hf"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_checkpoints_written_in_the_background_resume(corpus, tmp_path, plain):
    saving = {**SHORT, "train.checkpoint.save_steps": 1, "train.checkpoint.async_save": "true"}
    agree(train(corpus, tmp_path, 2, "fsdp2", saving), plain[0], 1e-9)
    before = rows(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "global_step_3")
    assert [path.name for path in (tmp_path / "checkpoints").glob("global_step_*")] == ["global_step_2"]
    resumed = train(corpus, tmp_path, 2, "fsdp2", saving)
    assert resumed[:2] == before[:2]  # their times too: these steps were not taken again
    assert resumed[2] != before[2]
    agree(resumed, before, 0.0)
