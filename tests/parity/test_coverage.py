"""A sample of benchmarks/coverage.py: the pages say what the code does, and no architecture is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.coverage import EXACT, LIMIT, MODES, UNMEASURED, UNSUPPORTED, WRONG, verdict

ROOT = Path(__file__).parents[2]
WRITTEN = {
    name: dict(re.findall(r"^\| ([\w.-]+) \| ([\w' ]+) \|", (ROOT / mode.page).read_text(), re.MULTILINE))
    for name, mode in MODES.items()
}
ENOUGH = {"ulysses": 80, "experts": 40}
SAMPLES = {
    "ulysses": {
        **dict.fromkeys(("gpt2", "gpt_neox", "phi3", "stablelm", "olmo2", "cohere2", "gemma2", "gemma3_text"), EXACT),
        **dict.fromkeys(("granite", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text"), EXACT),
        **dict.fromkeys(("minicpm3", "apertus", "dots1", "diffllama", "llama4"), EXACT),
        **dict.fromkeys(("mamba", "bloom", "bert", "bart", "rwkv", "minimax", "lfm2", "openai-gpt"), UNSUPPORTED),
        "git": LIMIT,
    },
    "experts": {
        **dict.fromkeys(("dots1", "granitemoe", "hunyuan_v1_moe", "phimoe", "gemma4_text", "flex_olmo"), EXACT),
        **dict.fromkeys(("qwen3_vl_moe", "glm4v_moe", "ernie4_5_vl_moe", "qwen3_next", "nemotron_h"), EXACT),
        **dict.fromkeys(("llama4_text", "dbrx"), UNSUPPORTED),
    },
}


@pytest.mark.parametrize(("mode", "model_type"), [(mode, name) for mode in MODES for name in SAMPLES[mode]])
def test_the_page_says_what_is_so(mode, model_type):
    found = verdict(model_type, mode)
    assert found.status == SAMPLES[mode][model_type], found
    assert WRITTEN[mode][model_type] == found.status


@pytest.mark.parametrize("mode", MODES)
def test_enough_is_exact_nothing_wrong_and_everything_measured(mode):
    statuses = list(WRITTEN[mode].values())
    assert len(statuses) >= len(SAMPLES[mode])
    assert statuses.count(EXACT) >= ENOUGH[mode]
    assert not {UNMEASURED, WRONG} & set(statuses)
