"""Every configuration in ``configs/`` loads, and its model has the published number of parameters."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.config.samples import REPOSITORY
from veomni.cli import main
from veomni.models import build_model, derive_plan, freeze
from veomni.run_config import Config, check_layout

# Published: the model cards' safetensors totals, tied heads counted once. The two omni models are their thinkers: that
# of Qwen2.5-Omni as saved without the talker (the whole has 10,732,225,408), of Qwen3-Omni the card of the Thinking
# model, which has no talker.
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
    "qwen2_5_vl_7b": 8_292_166_656,
    "qwen3_vl_8b": 8_767_123_696,
    "qwen3_vl_30b_a3b": 31_070_754_032,
    "qwen2_5_omni_7b": 8_931_813_888,
    "qwen3_omni_30b_a3b": 31_719_205_488,
    "tiny": 2_017_344,
    "tiny_moe": 3_299_904,
    "long_context": 360_768,
    "tiny_vlm": 832_896,
    "tiny_omni": 817_456,
}
WORLDS = {"tiny": 2, "tiny_moe": 4, "long_context": 4, "tiny_vlm": 2, "tiny_omni": 2, "deepseek_v3": 256}
PAGE = REPOSITORY / "docs/multimodal_models.md"
FILES = {path.stem: path for path in sorted((REPOSITORY / "configs").rglob("*.yaml")) if path.parent.name != "bases"}


def test_every_file_has_its_number() -> None:
    assert FILES.keys() == PARAMETERS.keys()
    used = {Path(str(Config.from_file(path).model.config_path)).name for path in FILES.values()}
    assert used == {path.name for path in (REPOSITORY / "configs/model_configs").iterdir()}


@pytest.mark.parametrize("name", FILES)
def test_it_loads_and_builds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    config = Config.from_file(FILES[name])
    check_layout(config, WORLDS.get(name, 32 if config.train.micro_batch_size <= 2 else 16))
    model = build_model(str(config.model.config_path), weights="random")
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    assert config.data.max_seq_len <= text.max_position_embeddings
    freeze(model, config.model.freeze)


TOWERS = {
    "qwen2_5_vl_7b": {"visual": 676_550_144},
    "qwen3_vl_8b": {"visual": 576_388_336},
    "qwen3_vl_30b_a3b": {"visual": 538_631_408},
    "qwen2_5_omni_7b": {"visual": 676_550_144, "audio_tower": 639_647_232},
    "qwen3_omni_30b_a3b": {"visual": 538_631_408, "audio_tower": 647_927_168},
}


@pytest.mark.parametrize("name", TOWERS)
def test_towers_are_as_large_as_published_and_split_by_blocks(name: str) -> None:
    model = build_model(str(REPOSITORY / f"configs/model_configs/{name}.json"), weights="random")
    blocks = derive_plan(model).blocks
    for tower, expected in TOWERS[name].items():
        [module] = [module for path, module in model.named_modules() if path.split(".")[-1] == tower]
        assert sum(parameter.numel() for parameter in module.parameters()) == expected
        layers = module.layers if tower == "audio_tower" else module.blocks
        depth = len(layers)  # type: ignore[arg-type]
        assert sum(f"{tower}." in block for block in blocks) == depth


@pytest.mark.parametrize("name", TOWERS)
def test_headers_say_what_plan_says(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(REPOSITORY)
    main(["plan", str(FILES[name]), "--world", "8"])
    facts = {line[:28].strip(): line[28:] for line in capsys.readouterr().out.splitlines()}
    config = Config.from_file(FILES[name])
    model = build_model(str(config.model.config_path), weights="random")
    freeze(model, config.model.freeze)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    gib = 1024**3
    assert facts["parameters per rank"] == f"{PARAMETERS[name] * 4 / 8 / gib:.3f} GiB (device)"
    assert facts["gradients per rank"] == f"{trained * 4 / 8 / gib:.3f} GiB (device)"
    assert facts["optimizer per rank"] == f"{trained * 8 / 8 / gib:.3f} GiB (device)"
    if config.model.freeze:
        assert facts["parameters of the model"] == f"{PARAMETERS[name]:,}, {trained:,} trained"
    said = re.search(r"take ([\d.]+) GiB per rank", FILES[name].read_text())
    assert said is not None
    assert abs(float(said[1]) - float(facts["total per rank"].split()[0])) < 0.051
    row = re.search(rf"^\| `{name}\.yaml` \|.*\| ([\d.]+) GiB \|$", PAGE.read_text(), re.MULTILINE)
    assert row is not None
    assert row[1] == said[1]
