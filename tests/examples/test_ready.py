"""Every ready multimodal configuration trains: its own pipeline, model class, freezing and saving, at a small size."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.examples.ready import CONFIGS, arguments, prepare, small
from tests.harness import run_ranks
from veomni import load_config
from veomni.from_config import (
    build_launcher,
    create_optimizer,
    create_scheduler,
    load_batches,
    load_datasets,
    load_model,
    load_tokenizer,
    save_assets,
    total_steps,
)
from veomni.models import build_model

IMAGES, VIDEOS = {"pixel_values", "image_grid_thw"}, {"pixel_values_videos", "video_grid_thw"}
SOUNDS = {"input_features", "feature_attention_mask"}


def train(argv):
    """The loop of the example scripts; returns what it saw."""
    config = load_config(argv)
    output_dir = Path(config.train.output_dir)
    launcher = build_launcher(config)
    launcher.launch()
    train_set, _ = load_datasets(config)
    tokenizer = load_tokenizer(config, train_set)
    loader = load_batches(config, train_set, tokenizer, launcher, train=True)
    model = launcher.setup_model(load_model(config, tokenizer))
    optimizer = create_optimizer(config, model)
    steps = total_steps(config, loader)
    scheduler = create_scheduler(config, optimizer, steps)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    launcher.resume(state)
    save_assets(config, model, tokenizer)
    before = {name: value.full_tensor().clone() for name, value in model.state_dict().items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    rates = {round(group["initial_lr"], 6) for group in optimizer.param_groups}
    keys, losses = set(), []
    for batch in launcher.track(loader, max_steps=steps):
        for micro in launcher.accumulate(model, batch):
            keys |= micro.inputs.keys()
            launcher.backward(model(**micro.inputs).loss, micro)
        launcher.clip_grad_norm(model, config.train.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(launcher.global_loss(batch))
        launcher.log({"loss": losses[-1]})
        launcher.checkpoint(state)
    launcher.checkpoint(state)
    moved = {name for name, value in model.state_dict().items() if not value.full_tensor().equal(before[name])}
    launcher.export(model, output_dir / "hf", tokenizer=tokenizer)
    launcher.close()
    return {"keys": keys, "losses": losses, "moved": moved, "trained": trained, "rates": rates}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_ready_configuration_trains(name, tmp_path):
    kind, _ = small(name)
    prepare(tmp_path, name, sounds="omni" in name)
    argv = arguments(tmp_path, name)
    config = load_config(argv)
    [seen] = run_ranks(train, 1, argv, init=False)

    assert IMAGES | VIDEOS | (SOUNDS if "omni" in name else set()) <= seen["keys"]
    assert len(seen["losses"]) == 2
    assert all(0 < loss < 10 for loss in seen["losses"])

    frozen = {name for name in seen["moved"] if any(fnmatch(name, f"{part}*") for part in config.model.freeze)}
    assert not frozen
    assert not seen["moved"] - seen["trained"]
    for part in ("visual.merger", "layers.0", "embed_tokens", *(["audio_tower.proj"] if "omni" in name else [])):
        assert any(part in parameter for parameter in seen["moved"]), part
    assert any("visual.blocks" in parameter for parameter in seen["moved"]) == (name == "qwen3_vl_8b")
    assert seen["rates"] == ({1e-2, 1e-3} if config.train.optimizer.lr_scale else {1e-2})

    assert list(tmp_path.glob("cache/media/*/*.safetensors"))
    assert sorted(path.name for path in tmp_path.glob("output/checkpoints/global*")) == ["global_step_2"]
    exported = tmp_path / "output/hf"
    assert json.loads((exported / "config.json").read_text())["model_type"] == kind
    [file] = exported.glob("*.safetensors")
    with safe_open(file, "pt") as weights:
        assert len(list(weights.keys())) > 50
    assert type(build_model(exported)) is type(build_model(str(config.model.config_path), weights="random"))
