"""Stochastic rounding to bfloat16, with random bits that depend on what is rounded and not on where it lies.

The bits of an element are a hash of its number in the whole tensor and of a key. No generator has a state to save:
replicas, and ranks that hold other shards of the tensor, round an element alike, and so does a resumed run.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_FIRST, _SECOND = 0x21F0AAAD, 0x735A2D97  # below 2^31: a product with 32 bits does not overflow int64

Bits = TypeVar("Bits", int, Tensor)


def mix(value: Bits) -> Bits:
    """Return 32 bits that look random for the lowest 32 of ``value``, an int or int64 numbers; a bijection of them.

    https://github.com/skeeto/hash-prospector (two rounds of multiply and xorshift, measured bias 0.107).
    """
    value = value & _MASK
    value = ((value ^ (value >> 16)) * _FIRST) & _MASK
    value = ((value ^ (value >> 15)) * _SECOND) & _MASK
    return value ^ (value >> 15)


def element_numbers(box: Sequence[slice], shape: Sequence[int], device: torch.device) -> Tensor:
    """Return the number that each element of a part ``box`` of a tensor of this shape has in it, row by row, int64."""
    numbers = torch.zeros((), dtype=torch.int64, device=device)
    for part, size in zip(box, shape, strict=True):
        numbers = numbers.unsqueeze(-1) * size + torch.arange(part.start, part.stop, device=device)
    return numbers


def round_to_bfloat16(values: Tensor, bits: Tensor) -> Tensor:
    """Return float32 ``values`` rounded to a neighbour in bfloat16, by 16 random ``bits``, of int32, for each.

    The probability of the farther neighbour from zero is the part of the way to it, so the mean is the value. A NaN
    stays one.
    """
    sums = (values.view(torch.int32) + bits) & -0x10000
    return torch.where(values.isnan(), values, sums.view(torch.float32)).to(torch.bfloat16)
