"""Which backend runs a model's experts, and what is said when the wanted one cannot."""

from __future__ import annotations

import pytest
import torch

from tests.ops.experts.modules import experts
from veomni.errors import ModelError
from veomni.ops.experts.backends import choose_backend

HOPPER = ("triton", "grouped_mm", "loop")


@pytest.mark.parametrize(
    ("available", "compute", "expected"),
    [
        (HOPPER, torch.bfloat16, "triton"),
        (HOPPER, torch.float32, "loop"),
        (HOPPER, torch.float64, "loop"),
        (("loop", "grouped_mm"), torch.bfloat16, "loop"),
        (("npu", "loop"), torch.bfloat16, "npu"),
    ],
)
def test_auto_takes_the_first_that_can(available, compute, expected):
    assert choose_backend([experts("qwen3_moe")], "auto", available, compute) == expected


def test_auto_passes_over_sizes_a_kernel_cannot_address():
    odd = experts("qwen3_moe", moe_intermediate_size=20)
    assert choose_backend([experts("qwen3_moe"), odd], "auto", HOPPER, torch.bfloat16) == "loop"


@pytest.mark.parametrize("name", ["loop", "grouped_mm"])
def test_the_wanted_one(name):
    assert choose_backend([experts("gpt_oss")], name, HOPPER, torch.bfloat16) == name


@pytest.mark.parametrize(
    ("wanted", "available", "compute", "size", "said", "fix"),
    [
        ("triton", ("loop", "grouped_mm"), torch.bfloat16, 24, "triton does not run on this device", "grouped_mm"),
        ("grouped_mm", HOPPER, torch.float32, 24, "it computes in bf16, not in fp32", "auto or loop"),
        ("triton", HOPPER, torch.bfloat16, 20, "experts have 20 channels", "auto or loop"),
    ],
)
def test_one_that_cannot_is_rejected(wanted, available, compute, size, said, fix):
    module = experts("qwen3_moe", moe_intermediate_size=size)
    with pytest.raises(ModelError) as error:
        choose_backend([module], wanted, available, compute)
    assert said in error.value.problem
    assert fix in error.value.fix
    assert error.value.exit_code == 78
