"""Every ready multimodal configuration trains with its script: its own data pipeline, model class, freezing and saving.

At a small size on one CPU process: see ``ready.py`` for what is changed.
"""

from __future__ import annotations

import json
import runpy
import sys
from fnmatch import fnmatch

import pytest
import torch
from safetensors import safe_open

from tests.examples.ready import CONFIGS, ROOT, arguments, prepare, small
from tests.examples.script import rows
from veomni import load_config
from veomni.models import Materializer, build_config, build_model
from veomni.testing.ranks import run_ranks

IMAGES, VIDEOS = {"pixel_values", "image_grid_thw"}, {"pixel_values_videos", "video_grid_thw"}
SOUNDS = {"input_features", "feature_attention_mask"}


def run(script, argv):
    sys.argv = [script, *argv]
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")


def weights(source):
    """Return a model's class and its parameters: those of a directory, or those of seed 0."""
    model = build_model(source)
    Materializer(model, device=torch.device("cpu"), seed=0)(model)
    return type(model), dict(model.named_parameters())


def kept_keys(folder):
    """Return what the features on disk hold, by kind of media."""
    found = set()
    for path in folder.glob("cache/media/*/*.safetensors"):
        with safe_open(path, "pt") as features:
            found.add(frozenset(features.keys()))
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_a_ready_configuration_trains(name, tmp_path):
    kind, changes = small(name)
    heard = "omni" in name
    prepare(tmp_path, name, sounds=heard)
    argv = arguments(tmp_path, name)
    assert f"examples/train.py configs/multimodal/{name}.yaml" in CONFIGS[name].read_text()
    run_ranks(run, 1, "train.py", argv, init=False)

    losses = [row["loss"] for row in rows(tmp_path / "output")]
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)
    features = kept_keys(tmp_path)
    assert IMAGES in features
    assert any(VIDEOS | (SOUNDS if heard else set()) <= keys for keys in features), "a video, and its sound"
    assert (SOUNDS in features) == heard
    assert [path.name for path in tmp_path.glob("output/checkpoints/global*")] == ["global_step_2"]

    exported = tmp_path / "output/hf"
    assert json.loads((exported / "config.json").read_text())["model_type"] == kind
    before_class, before = weights(build_config(ROOT / f"configs/model_configs/{name}.json", changes))
    after_class, after = weights(exported)
    assert after_class is before_class
    assert after.keys() == before.keys()
    moves = {key: float((after[key] - before[key]).detach().abs().max()) for key in before}
    config = load_config(argv)
    frozen = {
        key for key in moves if any(fnmatch(key, f"{part}.*") or fnmatch(key, part) for part in config.model.freeze)
    }
    assert not any(moves[key] for key in frozen)
    towers = {key for key in moves if "visual.blocks" in key or "audio_tower.layers" in key}
    assert towers <= frozen or name == "qwen3_vl_8b"
    trained = ["visual.merger", "layers.0", "embed_tokens", *(["audio_tower.proj"] if heard else [])]
    for part in trained:
        assert max(move for key, move in moves.items() if part in key and key not in frozen) > 5e-3, part
    if config.train.optimizer.lr_scale:
        assert 5e-4 < max(moves[key] for key in towers) < 2.1e-3, "a tenth of two steps of 1e-2"
