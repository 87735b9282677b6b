"""Gradients copied one by one into the buffer that FSDP2 reduces.

PyTorch copies all of a unit's gradients with one kernel, which finds its way by tables with an entry for every few
kilobytes. The host writes them anew each time: for the experts of one layer (128 x 4.7 M parameters, one H200) it took
12 ms, in which the device ran dry, and the kernel took twice the time of plain copies.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import Library


@functools.cache
def copy_one_by_one() -> Library:
    """Make FSDP2 copy gradients with :func:`chunk_cat` from now on, on CPUs and GPUs."""
    from torch.distributed.fsdp import fully_shard  # noqa: F401  (defines the operation)

    library = Library("fsdp", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there was another implementation is the point
        for key in ("CPU", "CUDA"):
            library.impl("chunk_cat", chunk_cat, key)
    return library


def chunk_cat(tensors: Sequence[Tensor], dim: int, num_chunks: int, out: Tensor) -> None:
    """Write the ``i``-th chunk of every tensor, side by side, into the ``i``-th row of ``out``.

    Args:
        tensors: Gradients; their first dimension is what is split.
        dim: 0.
        num_chunks: Ranks that share the parameters.
        out: ``[num_chunks, *]``, of another format, maybe.
    """
    if dim != 0 or any(tensor.ndim == 0 or tensor.shape[0] % num_chunks for tensor in tensors):
        torch._chunk_cat(tensors, dim, num_chunks, out=out)  # it pads
        return
    place = 0
    for tensor in tensors:
        width = tensor.numel() // num_chunks
        out[:, place : place + width].copy_(tensor.reshape(num_chunks, width))
        place += width
