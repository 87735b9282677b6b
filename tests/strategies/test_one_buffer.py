"""A shard that is the whole: gradients stay in the buffer they were cast into."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from veomni.strategies.units import OneBuffer
from veomni.testing.ranks import run_ranks


class Recording(OneBuffer):
    def __init__(self):
        super().__init__()
        self.places = []

    def allocate(self, size, *, dtype, device):
        buffer = super().allocate(size, dtype=dtype, device=device)
        self.places.append(buffer.data_ptr())
        return buffer


def gradients(in_place):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    comm = Recording()
    if in_place:
        model.set_custom_reduce_scatter(comm)
    for scale in (1.0, 2.0):  # the second backward adds to the first one's gradients
        model(torch.linspace(0, scale, 8).view(2, 4)).square().sum().backward()
    places = {parameter.grad.to_local().untyped_storage().data_ptr() for parameter in model.parameters()}
    return [parameter.grad.to_local().tolist() for parameter in model.parameters()], comm.places, places


def test_one_buffer_and_the_same_gradients():
    ((plain, _, _),) = run_ranks(gradients, 1, False)
    ((result, allocated, places),) = run_ranks(gradients, 1, True)
    assert result == plain
    assert allocated[0] == allocated[1]
    assert allocated[2] == allocated[3]
    assert places == {allocated[0]}


def test_a_broken_off_reduction_does_not_mix_buffers():
    comm, device = OneBuffer(), torch.device("cpu")
    comm.allocate((4,), dtype=torch.float32, device=device)
    first = comm.allocate((8,), dtype=torch.float32, device=device)
    assert first.shape == (8,)
    assert comm.allocate((8,), dtype=torch.float32, device=device) is first
    assert comm.allocate((8,), dtype=torch.float32, device=device) is not first
