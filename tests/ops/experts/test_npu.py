"""The NPU backend against a stand-in for torch_npu: the calls are checked by what they compute; no NPU takes part."""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch

from tests.ops.experts.modules import EXPERTS, experts
from tests.ops.experts.test_experts import BOUNDS, assert_close, gradients, inputs, ours, truth
from veomni.accelerators import NPU
from veomni.ops.experts.forward import run_local_experts
from veomni.ops.experts.permute import route


def npu_grouped_matmul(x, weight, *, group_list, group_list_type, group_type, split_item):
    """What torch_npu documents: ends of groups, all rows in one; one tensor comes back; nothing written means NaN."""
    (left,), (right,) = x, weight
    assert group_list.dtype is torch.int64
    assert group_list_type == 0
    assert split_item == 3
    ends = group_list.tolist()
    assert ends == sorted(ends)
    assert ends[-1] == left.shape[1 if group_type == 2 else 0]
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    if group_type == 0:
        return [torch.cat([left[a:b] @ right[expert] for expert, (a, b) in enumerate(spans)])]
    assert group_type == 2
    result = left.new_full((len(ends), left.shape[0], right.shape[1]), float("nan"))
    for expert, (a, b) in enumerate(spans):
        if a < b:
            result[expert] = left[:, a:b] @ right[a:b]
    return [result]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    module = types.ModuleType("torch_npu")
    module.__spec__ = ModuleSpec("torch_npu", None)  # transformers looks for it
    module.npu_grouped_matmul = npu_grouped_matmul
    monkeypatch.setitem(sys.modules, "torch_npu", module)


def test_the_accelerator_has_it():
    assert NPU().experts_backends == ("npu", "loop")


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_equals_transformers(name):
    module = experts(name, torch.bfloat16)
    result = gradients(module, ours(module, "npu"), torch.bfloat16)
    assert_close(result, truth(module), BOUNDS[torch.bfloat16])


@pytest.mark.parametrize("spare", [0, 7])
def test_rows_past_the_end(spare):
    module = experts("qwen3_moe", torch.bfloat16)
    hidden, index, weights = inputs()
    elsewhere = index == 0
    local = index.where(~elsewhere, EXPERTS)
    rows = route(local, EXPERTS).first(int((~elsewhere).sum()) + spare)

    def run(hidden, index, weights):
        return run_local_experts(module, hidden, rows, local, weights, "npu")

    expected = truth(module, (hidden, index, weights.where(~elsewhere, 0.0)))
    expected["weights"] = expected["weights"].where(~elsewhere, 0.0)
    result = gradients(module, run, torch.bfloat16, (hidden, index, weights))
    assert_close(result, expected, BOUNDS[torch.bfloat16])
