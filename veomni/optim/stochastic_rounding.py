"""Stochastic rounding to bfloat16, with random bits that do not depend on the layout of shards.

The bits of an element are a hash of its index in the whole tensor and of a key. There is no generator whose state must
be saved: replicas, other shardings of the tensor and a resumed run round an element alike.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_FIRST, _SECOND = 0x21F0AAAD, 0x735A2D97  # below 2^31: a product with 32 bits does not overflow int64

Bits = TypeVar("Bits", int, Tensor)


def mix(value: Bits) -> Bits:
    """Return a 32-bit hash, a bijection, of the lowest 32 bits of ``value``, an int or an int64 tensor.

    https://github.com/skeeto/hash-prospector (two rounds of multiply and xorshift, measured bias 0.107).
    """
    value = value & _MASK
    value = ((value ^ (value >> 16)) * _FIRST) & _MASK
    value = ((value ^ (value >> 15)) * _SECOND) & _MASK
    return value ^ (value >> 15)


def element_numbers(box: Sequence[slice], shape: Sequence[int], device: torch.device) -> Tensor:
    """Return the row-major indices, int64, of the elements of the slice ``box`` of a tensor of this ``shape``."""
    numbers = torch.zeros((), dtype=torch.int64, device=device)
    for part, size in zip(box, shape, strict=True):
        numbers = numbers.unsqueeze(-1) * size + torch.arange(part.start, part.stop, device=device)
    return numbers


def round_to_bfloat16(values: Tensor, bits: Tensor) -> Tensor:
    """Return float32 ``values`` rounded to one of their two neighbours in bfloat16.

    ``bits`` are 16 random bits for each value, int32. The probability of a neighbour is proportional to the distance
    from the other one, so the expected result is the value. A NaN stays one.
    """
    sums = (values.view(torch.int32) + bits) & -0x10000
    return torch.where(values.isnan(), values, sums.view(torch.float32)).to(torch.bfloat16)
