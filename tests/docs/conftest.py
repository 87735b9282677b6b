"""A directory that looks like the repository, with a small model in it, for the commands of the documentation."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.data.multimodal.small_model import save_media, save_model
from tests.docs.pages import ROOT


@pytest.fixture(scope="session")
def documentation_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """A Qwen3 directory as the pages call ``my-model``: safetensors, tokenizer, chat template."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from veomni.data import train_byte_bpe

    directory = tmp_path_factory.mktemp("models") / "my-model"
    sizes = json.loads((ROOT / "configs/model_configs/tiny_qwen3.json").read_text())
    sizes |= {"vocab_size": 512, "num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 64}
    Qwen3ForCausalLM(Qwen3Config(**sizes)).save_pretrained(directory)
    train_byte_bpe([path.read_text() for path in (ROOT / "veomni").glob("*.py")], 512).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def small_omni_model(tmp_path_factory):
    """What the pages call ``my-omni``, and media for it."""
    directory = tmp_path_factory.mktemp("omni")
    save_model(directory / "my-omni")
    save_media(directory / "media")
    return directory


@pytest.fixture
def workspace(tmp_path, monkeypatch, small_model, small_omni_model, documentation_cache):
    for name in ("configs", "examples", "docs", "tests", "benchmarks", "train.sh", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my-model").symlink_to(small_model)
    (tmp_path / "my-omni").symlink_to(small_omni_model / "my-omni")
    shutil.copytree(small_omni_model / "media", tmp_path / "media")  # no links: they would lead out of the root
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(documentation_cache))
    return tmp_path
