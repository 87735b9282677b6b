"""A product per expert on Hopper and newer: persistent programs over tiles of rows, operands through the copy engine.

A tile never spans two experts. Which tiles there are depends on the counts of a step, so a first kernel lists them on
the device and the host reads nothing.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

# Tile of the result, channels multiplied at once, and tiles of rows that walk over the columns together.
_ROWS, _COLUMNS, _DEPTH, _BAND = 128, 256, 64, 8


@triton.jit
def _list_tiles_kernel(
    offsets, experts, starts, count, NUM_EXPERTS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr
):
    mine = tl.program_id(0)
    expert = tl.arange(0, PADDED)
    end = tl.load(offsets + expert, mask=expert < NUM_EXPERTS, other=0)
    begin = tl.load(offsets + expert - 1, mask=(expert > 0) & (expert < NUM_EXPERTS), other=0)
    tiles = tl.where(expert < NUM_EXPERTS, (end - begin + ROWS - 1) // ROWS, 0)
    first = tl.sum(tl.where(expert < mine, tiles, 0), 0)
    own = tl.sum(tl.where(expert == mine, tiles, 0), 0)
    start = tl.sum(tl.where(expert == mine, begin, 0), 0)
    for chunk in range(0, own, 32):
        tile = chunk + tl.arange(0, 32)
        tl.store(experts + first + tile, mine, mask=tile < own)
        tl.store(starts + first + tile, start + tile * ROWS, mask=tile < own)
    if mine == 0:
        tl.store(count, tl.sum(tiles, 0))


@triton.jit
def _matmul_kernel(
    rows, weights, result, offsets, experts, starts, count, width, depth, PROGRAMS: tl.constexpr,
    TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    tiles_down, tiles_across = tl.load(count), tl.cdiv(width, COLUMNS)
    for tile in tl.range(tl.program_id(0), tiles_down * tiles_across, PROGRAMS, flatten=True):
        # Bands of row tiles share the expert's columns while these are in the cache.
        first = tile // (BAND * tiles_across) * BAND
        in_band = tl.minimum(tiles_down - first, BAND)
        down = first + tile % (BAND * tiles_across) % in_band
        column = tile % (BAND * tiles_across) // in_band * COLUMNS
        expert, start = tl.load(experts + down), tl.load(starts + down)
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for channel in range(0, depth, DEPTH):
            left = rows.load([start, channel])
            if TRANSPOSED:
                right = weights.load([expert * width + column, channel]).T
            else:
                right = weights.load([expert * depth + channel, column])
            total = tl.dot(left, right, total)
        row, place = start + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        mask = (row < tl.load(offsets + expert))[:, None] & (place < width)[None, :]
        target = result + row.to(tl.int64)[:, None] * width + place[None, :]
        tl.store(target, total.to(result.dtype.element_ty), mask=mask)


def tiled_matmul(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """See :func:`veomni.ops.experts.backends.ExpertBackend.matmul`."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    (count, depth), (num_experts, _, width) = rows.shape, weights.shape
    transposed = weights.stride(1) == 1
    matrices = _for_copy_engine(weights.transpose(1, 2) if transposed else weights)
    most = triton.cdiv(count, _ROWS) + num_experts
    experts, starts = offsets.new_empty(most), offsets.new_empty(most)
    tiles, result = offsets.new_empty(1), rows.new_empty(count, width)
    _list_tiles_kernel[(num_experts,)](
        offsets, experts, starts, tiles, NUM_EXPERTS=num_experts, PADDED=triton.next_power_of_2(num_experts), ROWS=_ROWS
    )
    block = [_COLUMNS, _DEPTH] if transposed else [_DEPTH, _COLUMNS]
    programs = _multiprocessors(rows.device.index or 0)
    _matmul_kernel[(programs,)](
        TensorDescriptor.from_tensor(_for_copy_engine(rows), [_ROWS, _DEPTH]),
        TensorDescriptor.from_tensor(matrices.flatten(0, 1), block),
        result, offsets, experts, starts, tiles, width, depth, PROGRAMS=programs, TRANSPOSED=transposed,
        ROWS=_ROWS, COLUMNS=_COLUMNS, DEPTH=_DEPTH, BAND=_BAND, num_warps=8, num_stages=3,
    )  # fmt: skip
    return result


def tiles_fit(weights: Tensor) -> bool:
    """Return whether matrices ``[experts, in, out]`` are large enough for a tile."""
    return weights.shape[1] >= _DEPTH and weights.shape[2] >= _COLUMNS


def _for_copy_engine(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@functools.cache
def _multiprocessors(device: int) -> int:
    return int(triton.runtime.driver.active.utils.get_device_properties(device)["multiprocessor_count"])
