"""A sample of benchmarks/coverage.py, an architecture of each kind: the pages say what the code does, none is wrong."""

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
        # Learned positions, partly rotated heads, fused projections, capped and sliding attention, normalised heads.
        **dict.fromkeys(("gpt2", "gpt_neox", "phi3", "gemma2", "olmo2"), EXACT),
        "modernbert-decoder": EXACT,  # its get_decoder returns the head
        # Experts, sinks, low-rank projections, chunks under a vision encoder, a difference of attentions.
        **dict.fromkeys(("mixtral", "gpt_oss", "deepseek_v3", "llama4", "diffllama"), EXACT),
        # A recurrence, positions in the scores, attention in both directions, two stacks, linear attention.
        **dict.fromkeys(("mamba", "bloom", "bert", "bart", "minimax"), UNSUPPORTED),
        "git": LIMIT,
    },
    "experts": {
        **dict.fromkeys(("dots1", "granitemoe", "gemma4_text", "flex_olmo"), EXACT),
        **dict.fromkeys(("qwen3_vl_moe", "qwen3_next", "nemotron_h"), EXACT),
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
