"""Which kernel attention runs on a GPU: read off the operations that tensors without storage are dispatched to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import attention
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.tiny import tiny_config
from veomni.batch.forward_call import SequenceGroups
from veomni.batch.split import SequenceShard
from veomni.ops.attention.block import Block, Segments, attend
from veomni.ops.attention.ulysses import UlyssesAttention
from veomni.ops.attention.varlen import register_attention, varlen_attention
from veomni.ops.attention.whole_rows import SEQUENCE_GROUPS
from veomni.testing.ranks import run_ranks

CUDNN, FLASH = "aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_flash_attention"
VARLEN = "torch_attn::_varlen_attn"
SEQ = 64


class Kernels(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attn" in func.name() or "attention" in func.name():
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


def heads(batch: int = 1, head_dim: int = 64, seq: int = SEQ):
    shapes = [(batch, number, seq, head_dim) for number in (4, 2, 2)]
    return [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]


def boundaries(*offsets: int):
    return {"cu_seq_lens_q": torch.empty(len(offsets), dtype=torch.int32, device="cuda"), "max_length_q": SEQ}


@pytest.fixture
def package() -> Iterator[None]:
    """A flash-attention package that has replaced PyTorch's kernels."""

    class Handle:
        def remove(self) -> None:
            return

    attention.register_flash_attention_impl("test", register_fn=Handle)
    attention.activate_flash_attention_impl("test")
    yield
    attention.restore_flash_attention_impl()


def kernel_of(batch: int, head_dim: int, options, offsets: tuple[int, ...]) -> list[str]:
    with FakeTensorMode(), Kernels() as kernels:
        packed = boundaries(*offsets) if offsets else {}
        varlen_attention(nn.Module(), *heads(batch, head_dim), None, **packed, **options)
    return kernels.found


CASES = [
    (1, 64, {}, (), CUDNN),
    (1, 64, {}, (0, SEQ), CUDNN),  # boundaries of one document a row
    (2, 64, {}, (0, SEQ, 2 * SEQ), CUDNN),
    (1, 64, {}, (0, 10, SEQ), VARLEN),
    (1, 64, {"sliding_window": 8}, (), VARLEN),
    (1, 256, {}, (), VARLEN),
]


@pytest.mark.parametrize(("batch", "head_dim", "options", "offsets", "kernel"), CASES)
def test_whole_rows(batch, head_dim, options, offsets, kernel):
    assert kernel_of(batch, head_dim, options, offsets) == [kernel]


def test_an_installed_package_computes_dense_rows_too(package):
    assert kernel_of(1, 64, {}, ()) == [FLASH]
    assert kernel_of(1, 64, {}, (0, 10, SEQ)) == [VARLEN]


def under_ulysses(offsets: tuple[int, ...]) -> list[str]:
    register_attention()
    module = nn.Module()
    module.config = tiny_config("llama")
    groups = SequenceGroups(SequenceShard(dist.get_world_size()), dist.group.WORLD, ulysses=dist.group.WORLD)
    setattr(module, SEQUENCE_GROUPS, groups)
    with FakeTensorMode(), Kernels() as kernels:
        packed = boundaries(*offsets) if offsets else {}
        UlyssesAttention("varlen")(module, *heads(seq=SEQ // 2), None, **packed)
    return kernels.found


def test_ulysses_takes_the_same_ones():
    assert run_ranks(under_ulysses, 2, ()) == [[CUDNN]] * 2
    assert run_ranks(under_ulysses, 2, (0, 10, SEQ)) == [[VARLEN]] * 2


@pytest.mark.parametrize(
    ("head_dim", "packed", "kernel"),
    [(64, False, CUDNN), (256, False, FLASH), (64, True, "aten::_flash_attention_forward")],
)
def test_parts_on_a_ring(head_dim, packed, kernel):
    with FakeTensorMode(), Kernels() as kernels:
        offsets = torch.empty(3, dtype=torch.int32, device="cuda")
        documents = Segments(offsets, offsets, SEQ) if packed else None
        attend(Block(*heads(head_dim=head_dim), 1.0, causal=True, segments=documents))
    assert kernels.found == [kernel]
