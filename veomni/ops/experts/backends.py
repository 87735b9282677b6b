"""Backends of the products of rows, sorted by expert, and their experts' matrices; other packages bring theirs."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from veomni.config.problems import Problem
from veomni.errors import ModelError
from veomni.ops.experts.layout import products
from veomni.ops.experts.permute import past_end
from veomni.registry import Registry

EXPERTS: Registry[type[ExpertBackend]] = Registry("experts backend", group="veomni.experts", home=__name__)
"""Backends by the names that configurations use."""

_PRECISIONS = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}
_FIX = "use auto or loop"


class ExpertBackend(ABC):
    """One way of multiplying every row with the matrix of its expert, in the precisions and on the devices it names.

    A third-party backend subclasses this and names itself in the entry-point group ``veomni.experts``. Every row must
    have a multiple of ``channels``; ``devices`` None is all.
    """

    precisions: ClassVar[tuple[str, ...]] = ("bf16",)
    devices: ClassVar[tuple[str, ...] | None] = None
    channels: ClassVar[int] = 1

    @abstractmethod
    def matmul(self, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        """Return every row's product, ``[rows, out]``; rows past ``offsets[-1]`` may hold anything.

        The one or more ``rows``, ``[rows, in]``, are sorted by expert; ``offsets``, int32 ``[experts]``, are where each
        expert's end. Of ``weights``, ``[experts, in, out]``, every matrix or its transpose is contiguous.
        """

    @abstractmethod
    def outer(self, left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
        """Return ``left.T @ right`` over each expert's rows, ``[experts, left, right]``; zeros for one without rows."""

    @classmethod
    def problem(cls, modules: Sequence[nn.Module], compute: torch.dtype) -> str | None:
        """Return why this backend cannot run a model's experts in a number format; None where it can."""
        if _PRECISIONS.get(compute) not in cls.precisions:
            return f"it computes in {', '.join(cls.precisions)}, not in {_PRECISIONS.get(compute, compute)}"
        parameters = (getattr(module, name) for module in modules for name in products(module))
        odd = [size for parameter in parameters for size in parameter.shape[1:] if size % cls.channels]
        if odd:
            return f"its rows must be a multiple of {cls.channels} channels, and experts have {odd[0]} channels"
        return None

    @classmethod
    def config_problems(cls, name: str, train: Any) -> Iterator[Problem]:
        """Yield why this backend, called ``name``, cannot run with the section ``train``."""
        device = train.accelerator.chosen
        if train.precision not in cls.precisions:
            problem = f"model.experts {name} does not compute in {train.precision}"
            yield Problem(problem, f"{_FIX}, or train.precision {cls.precisions[-1]}")
        elif device != "auto" and cls.devices is not None and device not in cls.devices:
            yield Problem(f"model.experts {name} does not run on accelerator {device}", _FIX)


@EXPERTS.register("loop")
class Loop(ExpertBackend):
    """A product per expert, whose rows the host counts."""

    precisions = ("fp64", "fp32", "bf16")

    @override
    def matmul(self, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        result = rows.new_zeros(rows.shape[0], weights.shape[2])
        for expert, span in enumerate(_spans(offsets)):
            torch.mm(rows[span], weights[expert], out=result[span])
        return result

    @override
    def outer(self, left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
        result = left.new_zeros(offsets.shape[0], left.shape[1], right.shape[1])
        for expert, span in enumerate(_spans(offsets)):
            torch.mm(left[span].t(), right[span], out=result[expert])
        return result


def _spans(offsets: Tensor) -> list[slice]:
    ends = offsets.tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


@EXPERTS.register("grouped_mm")
class GroupedMM(ExpertBackend):
    """PyTorch's grouped product, whose rows must be a multiple of 16 bytes."""

    devices: ClassVar[tuple[str, ...] | None] = ("cpu", "cuda")
    channels = 8

    @override
    def matmul(self, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        return F.grouped_mm(rows, weights, offs=offsets)

    @override
    def outer(self, left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
        return F.grouped_mm(left.t(), right, offs=offsets)


@EXPERTS.register("triton")
class Triton(GroupedMM):
    """A kernel of this package for products that fill its tiles, PyTorch's for the others."""

    devices = ("cuda",)

    @override
    def matmul(self, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        from veomni.ops.experts import matmul_triton

        if matmul_triton.tiles_fit(weights):
            return matmul_triton.tiled_matmul(rows, weights, offsets)
        return super().matmul(rows, weights, offsets)


@EXPERTS.register("npu")
class GroupedMatmulNPU(ExpertBackend):
    """``npu_grouped_matmul`` of torch_npu.

    The kernel needs an expert for every row. Rows past the last end are assigned to the last expert: their products are
    never read, and where experts divide the sum they are zeroed first.
    """

    devices = ("npu",)
    channels = 8

    @override
    def matmul(self, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        return self._call(rows, weights, offsets, len(rows), group_type=0)

    @override
    def outer(self, left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
        left, right = (rows.masked_fill(past_end(rows, offsets), 0) for rows in (left, right))
        product = self._call(left.t(), right, offsets, len(right), group_type=2)
        empty = offsets.diff(prepend=offsets.new_zeros(1)) == 0  # the kernel is not documented to write those
        return product.masked_fill(empty[:, None, None], 0)

    @staticmethod
    def _call(left: Tensor, right: Tensor, offsets: Tensor, count: int, *, group_type: int) -> Tensor:
        """Call the kernel; experts divide the rows of the result (type 0), or the dimension summed over (2)."""
        import torch_npu

        ends = offsets.long()
        ends[-1] = count
        product: Tensor = torch_npu.npu_grouped_matmul(
            [left], [right], group_list=ends, group_list_type=0, group_type=group_type, split_item=3
        )[0]
        return product


_OFFERED = frozenset({"loop", "grouped_mm", "triton", "npu"})
"""Backends that run only where an accelerator offers them; those of other packages decide in ``problem``."""


@functools.cache
def _backend(name: str) -> ExpertBackend:
    return EXPERTS.get(name)()


def grouped_matmul(rows: Tensor, weights: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """See :meth:`ExpertBackend.matmul`; there may be no row. Has no gradient."""
    return _backend(backend).matmul(rows, weights, offsets) if len(rows) else rows.new_empty(0, weights.shape[2])


def grouped_outer(left: Tensor, right: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """See :meth:`ExpertBackend.outer`; there may be no row. Has no gradient."""
    if not len(left):
        return left.new_zeros(len(offsets), left.shape[1], right.shape[1])
    return _backend(backend).outer(left, right, offsets)


def choose_backend(modules: Sequence[nn.Module], wanted: str, available: Sequence[str], compute: torch.dtype) -> str:
    """Return the backend for all experts modules of a model, whose products are computed in a number format.

    ``wanted`` is its name, or "auto" for the first of the device's ``available`` ones, fastest first, that can. One
    that cannot run here is a ModelError.
    """
    if wanted == "auto":
        return next(name for name in available if EXPERTS.get(name).problem(modules, compute) is None)
    problem = EXPERTS.get(wanted).problem(modules, compute)
    if wanted in _OFFERED and wanted not in available:
        problem, fix = (
            f"experts {wanted} does not run on this device",
            f"set experts to auto or {' or '.join(available)}",
        )
    elif problem is not None:
        problem, fix = f"experts {wanted} cannot run this model: {problem}", "set experts to auto or loop"
    else:
        return wanted
    raise ModelError(problem, fix, field="build_model.experts")
