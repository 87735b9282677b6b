"""What a layout of GPUs saves, another loads bit for bit, and the losses go on as one GPU's."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.checkpoint import test_expert_layouts as cpu
from tests.gpu.devices import KIND, RANKS, on_devices, outcome_of

ANY = [
    ("adamw", "fsdp2_1", "single"),
    ("adamw", "fsdp2_2", "ep2_fsdp2"),
    ("adamw", "ep2_fsdp2", "fsdp2_2"),
    ("adamw", "ep2_fsdp1", "single"),
    ("adamw", "fsdp2_offload", "ep2_fixed"),
    ("muon", "ep2_ddp", "fsdp2_2"),
    *cpu.CASES,
]
CASES = [case for case in ANY if all(cpu.ALL[layout][0] in RANKS for layout in case[1:])]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of four steps, what a layout saves after two, and what another makes of it: each once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def together(jobs):
        found = {}
        for ranks in RANKS:
            same = [job for job in jobs if cpu.ALL[job[2]][0] == ranks]
            runs = [
                partial(cpu.train, folder / f"{name}-{source}", layout, name, steps, load=load, accelerator=KIND)
                for name, source, layout, steps, load in same
            ]
            found |= zip(same, on_devices(runs, ranks), strict=True)
        return found

    whole = {name: (name, "unbroken", "single", 4, False) for name, _, _ in CASES}
    saves = {case[:2]: (*case[:2], case[1], 2, False) for case in CASES}
    loads = {case: (*case, 2, True) for case in CASES}
    saved = together(dict.fromkeys([*whole.values(), *saves.values()]))
    loaded = together(loads.values())
    return lambda case: (
        outcome_of(saved[whole[case[0]]])[0], outcome_of(saved[saves[case[:2]]])[0], outcome_of(loaded[loads[case]])
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_weights_and_optimizer_are_bitwise_and_the_losses_go_on(case, runs):
    (_, expected), (saved, before), resumed = runs(case)
    for found, after in resumed:
        assert before + after == pytest.approx(expected, rel=1e-10)
        assert found.keys() == saved.keys()
        for key, value in saved.items():
            assert torch.equal(found[key], value) if isinstance(value, Tensor) else found[key] == value, key
