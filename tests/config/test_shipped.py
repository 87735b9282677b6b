"""Every configuration in ``configs/`` loads, and its model has the published number of parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.samples import REPOSITORY
from veomni.config import Config, check_layout
from veomni.models import build_model

# Published: the model cards' safetensors totals, tied heads counted once.
PARAMETERS = {
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "qwen3_0.6b": 596_049_920,
    "qwen3_1.7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_32b": 32_762_123_264,
    "qwen3_30b_a3b": 30_532_122_624,
    "gpt_oss_20b": 20_914_757_184,
    "deepseek_v3": 671_026_404_352,  # without the layer that predicts a second token
    "tiny": 2_410_560,
    "tiny_moe": 3_299_904,
    "long_context": 360_768,
}
WORLDS = {"tiny": 2, "tiny_moe": 4, "long_context": 4, "deepseek_v3": 256}
FILES = {path.stem: path for path in sorted((REPOSITORY / "configs").rglob("*.yaml"))}


def test_every_file_has_its_number() -> None:
    assert FILES.keys() == PARAMETERS.keys()
    used = {Path(str(Config.from_file(path).model.config_path)).name for path in FILES.values()}
    used.add("tiny_omni.json")  # composed models are built in code: docs/multimodal_models.md
    assert used == {path.name for path in (REPOSITORY / "configs/model_configs").iterdir()}


@pytest.mark.parametrize("name", FILES)
def test_it_loads_and_builds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    config = Config.from_file(FILES[name])
    check_layout(config, WORLDS.get(name, 32 if config.train.micro_batch_size <= 2 else 16))
    model = build_model(str(config.model.config_path), weights="random")
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert config.data.max_seq_len <= model.config.max_position_embeddings  # type: ignore[union-attr, operator]
