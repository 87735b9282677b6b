"""A product per expert on Ascend NPUs: ``npu_grouped_matmul`` of torch_npu.

The kernel needs an expert for every row. Rows past the last end are given to the last expert: in a product
they may hold anything, and in a sum they are made zeros first.
"""

from __future__ import annotations

import torch_npu
from torch import Tensor

from veomni.ops.experts.permute import past_end

_SPLIT_ROWS, _SPLIT_INNER = 0, 2
"""``group_type``: experts divide the rows of the result, or the dimension that is summed over."""


def grouped_matmul(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """See :func:`veomni.ops.experts.matmul.grouped_matmul`."""
    return _call(rows, weights, offsets, _SPLIT_ROWS)


def grouped_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """See :func:`veomni.ops.experts.matmul.grouped_outer`."""
    left, right = (rows.masked_fill(past_end(rows, offsets), 0) for rows in (left, right))
    product = _call(left.t(), right, offsets, _SPLIT_INNER)
    dead = offsets.diff(prepend=offsets.new_zeros(1)) == 0  # that the kernel writes there is documented nowhere
    return product.masked_fill(dead[:, None, None], 0)


def _call(left: Tensor, right: Tensor, offsets: Tensor, group_type: int) -> Tensor:
    ends = offsets.long()
    ends[-1] = left.shape[0] if group_type == _SPLIT_ROWS else left.shape[1]
    product: Tensor = torch_npu.npu_grouped_matmul(
        [left], [right], group_list=ends, group_list_type=0, group_type=group_type, split_item=3
    )[0]
    return product
