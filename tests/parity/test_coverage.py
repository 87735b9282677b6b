"""A sample of benchmarks/coverage.py: the page says what the code does, and no architecture is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.coverage import EXACT, REFUSED, WRONG, verdict

PAGE = (Path(__file__).parents[2] / "docs" / "coverage.md").read_text()
WRITTEN = dict(re.findall(r"^\| ([\w.-]+) \| ([\w ]+) \|", PAGE, re.MULTILINE))
SAMPLE = {
    **dict.fromkeys(("gpt2", "gpt_neox", "phi3", "opt", "olmo2", "cohere2", "gemma2", "gemma3_text", "granite"), EXACT),
    **dict.fromkeys(("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text", "minicpm3"), EXACT),
    **dict.fromkeys(("mamba", "bloom", "bert", "bart", "rwkv", "minimax"), REFUSED),
}


@pytest.mark.parametrize("model_type", SAMPLE)
def test_the_page_says_what_is_so(model_type):
    found = verdict(model_type)
    assert found.status == SAMPLE[model_type], found
    assert WRITTEN[model_type] == found.status


def test_enough_is_exact_and_nothing_wrong():
    statuses = list(WRITTEN.values())
    assert statuses.count(EXACT) >= 80
    assert WRONG not in statuses
