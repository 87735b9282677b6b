"""Attention of some queries over some of the keys, in a form whose parts can be put together.

Beside its output a part returns the logarithm of the sum of the exponentials of its scores (lse); with it, outputs over
different keys add up to the output over all of them. The gradient of a part needs only the output and the lse over all
keys, as in FlashAttention (Dao et al., 2022, arXiv:2205.14135).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from veomni.compat import attention_kernels as kernels
from veomni.ops.attention.row_rules import document_numbers
from veomni.ops.attention.varlen import dense_kernel
from veomni.parallel.wrappers import wide_dtype

Kernel = Literal["math", "varlen", "cudnn", "flash", "efficient"]
Gradients = tuple[Tensor, Tensor, Tensor]

_LARGEST_FLASH_HEAD = 256
_WIDTH_MULTIPLE = 8
_BIAS_MULTIPLE = 16
_LSE_MULTIPLE = 32
# Finite, as a kernel may return NaN for a row of infinities; exp of it is zero, and float16 holds it.
_HIDDEN = -3e4


class Segments(NamedTuple):
    """The documents of a block: a query sees the keys of its own.

    Offsets into the flattened rows of queries and of keys, int32 ``[documents + 1]`` both, and at least the tokens of
    the longest document.
    """

    queries: Tensor
    keys: Tensor
    longest: int


@dataclass(frozen=True)
class Block:
    """Some queries, and the keys they are to see; ``scale`` is a factor on the scores.

    Query, key and value are ``[batch, heads, q, head_dim]``, ``[batch, kv_heads, kv, head_dim]`` and ``[batch,
    kv_heads, kv, value_head_dim]``; ``kv_heads`` divides ``heads``. ``causal`` lets query ``i`` see keys up to ``i``
    only; ``q`` equals ``kv`` then, and there is no ``mask``, which is True where a query sees a key, ``[batch, 1, q,
    kv]``, or None for everywhere. ``segments`` keeps documents apart.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    causal: bool = False
    mask: Tensor | None = None
    segments: Segments | None = None

    @property
    def kernel(self) -> Kernel:
        """What computes it."""
        kernel = select_kernel(
            self.query.device.type, self.query.dtype, self.query.shape[-1], self.value.shape[-1],
            masked=self.mask is not None,
        )  # fmt: skip
        if kernel != "flash":
            return kernel
        if self.segments is not None:
            return "varlen"
        return dense_kernel(self.query, self.value) or "flash"

    def visible(self) -> Tensor | None:
        """Return the mask, or that of the segments; the causal one is not in it. None is everywhere."""
        if self.segments is None:
            return self.mask
        queries, keys = (
            document_numbers(boundaries, len(heads), heads.shape[2])
            for boundaries, heads in ((self.segments.queries, self.query), (self.segments.keys, self.key))
        )
        return (queries[:, :, None] == keys[:, None, :])[:, None]


def select_kernel(device_type: str, dtype: torch.dtype, head_dim: int, value_head_dim: int, *, masked: bool) -> Kernel:
    """Return what computes a block; ``masked`` is whether there is a boolean mask."""
    half = dtype in (torch.bfloat16, torch.float16)
    aligned = head_dim % _WIDTH_MULTIPLE == 0 and value_head_dim % _WIDTH_MULTIPLE == 0
    if device_type != "cuda" or not aligned or not (half or dtype is torch.float32):
        return "math"
    if half and not masked and head_dim == value_head_dim <= _LARGEST_FLASH_HEAD:
        return "flash"
    return "efficient"


def attend(block: Block) -> tuple[Tensor, Tensor]:
    """Attend over a part of the keys, and return the output and the lse.

    The output, ``[batch, heads, q, value_head_dim]``, is in the format of the queries or finer; the lse, ``[batch,
    heads, q]``, in that of accumulation. They are zero and minus infinity for a query that sees nothing.
    """
    forward, _ = _KERNELS[block.kernel]
    return forward(block)


def attend_backward(block: Block, grad: Tensor, output: Tensor, lse: Tensor) -> Gradients:
    """Return what a part of the keys adds to the gradients of queries, and the gradients of its keys and values.

    ``output``, its gradient ``grad`` and ``lse`` are those over all keys, in the shapes that :func:`attend` returns;
    the output is in the format of the queries.
    """
    _, backward = _KERNELS[block.kernel]
    return backward(block, grad, output, lse)


def merge_into(total: Tensor, total_lse: Tensor, output: Tensor, lse: Tensor) -> None:
    """Add a part's output and lse to the sum of others, in place.

    Before the first part ``total`` is zero, in the format of accumulation, and ``total_lse`` minus infinity.
    """
    together = torch.logaddexp(total_lse, lse)
    origin = _finite(together, 0.0)
    total.mul_((total_lse - origin).exp_().unsqueeze(-1))
    total.add_(output * (lse - origin).exp_().unsqueeze(-1))
    total_lse.copy_(together)


def _finite(lse: Tensor, instead: float) -> Tensor:
    """Replace the lse of queries that see nothing, whose difference to itself is not a number."""
    return lse.masked_fill(lse == -torch.inf, instead)


def _scores(block: Block, query: Tensor, key: Tensor) -> Tensor:
    """Return ``[batch, kv_heads, heads / kv_heads * q, kv]``, minus infinity where hidden."""
    scores, mask, length = _by_key_head(query, key) @ key.mT * block.scale, block.visible(), query.shape[2]
    if block.causal:
        lower = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
        mask = lower if mask is None else mask & lower
    if mask is not None:
        scores.unflatten(2, (-1, length)).masked_fill_(~mask.unsqueeze(1), -torch.inf)
    return scores


def _by_key_head(per_head: Tensor, key: Tensor) -> Tensor:
    """Lay the heads that share a key head one after the other along the rows, so that no key is repeated."""
    return per_head.unflatten(1, (key.shape[1], -1)).flatten(2, 3)


def _math(block: Block) -> tuple[Tensor, Tensor]:
    dtype = wide_dtype(block.query.dtype)
    scores = _scores(block, block.query.to(dtype), block.key.to(dtype))
    lse = scores.logsumexp(-1)
    output = (scores - _finite(lse, 0.0).unsqueeze(-1)).exp_() @ block.value.to(dtype)
    shape = block.query.shape[:3]
    return output.reshape(*shape, -1), lse.reshape(shape)


def _math_backward(block: Block, grad: Tensor, output: Tensor, lse: Tensor) -> Gradients:
    tensors = grad, output, block.query, block.key, block.value
    grad, output, query, key, value = (tensor.to(wide_dtype(block.query.dtype)) for tensor in tensors)
    weights = (_scores(block, query, key) - _by_key_head(_finite(lse, 0.0).unsqueeze(-1), key)).exp_()
    common = _by_key_head((grad * output).sum(-1, keepdim=True), key)
    rows = _by_key_head(grad, key)
    grad_scores = (rows @ value.mT).sub_(common).mul_(weights).mul_(block.scale)
    grad_query = (grad_scores @ key).reshape(query.shape)
    return grad_query, grad_scores.mT @ _by_key_head(query, key), weights.mT @ rows


def _flash(block: Block) -> tuple[Tensor, Tensor]:
    tensors = block.query, block.key, block.value
    output, lse, *_ = kernels.FLASH(*tensors, 0.0, block.causal, False, scale=block.scale)
    return output, lse


def _flash_backward(block: Block, grad: Tensor, output: Tensor, lse: Tensor) -> Gradients:
    query, key = block.query, block.key
    grads: Gradients = kernels.FLASH_BACKWARD(
        grad, query, key, block.value, output, lse.contiguous(), None, None, query.shape[2], key.shape[2], 0.0,
        block.causal, *_no_randomness(block), scale=block.scale,
    )  # fmt: skip
    return grads


def _varlen(block: Block) -> tuple[Tensor, Tensor]:
    segments, (batch, _, length, _) = block.segments, block.query.shape
    assert segments is not None
    flat = [_flat(heads) for heads in (block.query, block.key, block.value)]
    output, lse, *_ = kernels.VARLEN(
        *flat, segments.queries, segments.keys, *_longest(block), 0.0, block.causal, False, scale=block.scale
    )
    lse = lse.unflatten(1, (batch, length)).transpose(0, 1)
    # FlashAttention 2 gives a query without keys zeros, and an lse of plus infinity.
    return output.unflatten(0, (batch, length)).transpose(1, 2), lse.masked_fill(lse == torch.inf, -torch.inf)


def _varlen_backward(block: Block, grad: Tensor, output: Tensor, lse: Tensor) -> Gradients:
    segments = block.segments
    assert segments is not None
    flat = [_flat(heads) for heads in (grad, block.query, block.key, block.value, output)]
    grads = kernels.VARLEN_BACKWARD(
        *flat, lse.transpose(0, 1).flatten(1).contiguous(), segments.queries, segments.keys, *_longest(block), 0.0,
        block.causal, *_no_randomness(block), scale=block.scale,
    )  # fmt: skip
    query, key, value = (part.unflatten(0, (len(block.query), -1)).transpose(1, 2) for part in grads)
    return query, key, value


def _flat(heads: Tensor) -> Tensor:
    """Return what variable-length kernels take, ``[batch * seq, heads, head_dim]``."""
    return heads.transpose(1, 2).flatten(0, 1)


def _longest(block: Block) -> tuple[int, int]:
    assert block.segments is not None
    return min(block.segments.longest, block.query.shape[2]), min(block.segments.longest, block.key.shape[2])


def _no_randomness(block: Block) -> tuple[Tensor, Tensor]:
    """Return what kernels take as the state of a generator: nothing is drawn without dropout."""
    device = block.query.device
    return torch.empty(2, dtype=torch.uint64, device=device), torch.empty((), dtype=torch.uint64, device=device)


def _cudnn(block: Block) -> tuple[Tensor, Tensor]:
    tensors = block.query, block.key, block.value
    output, lse, *_ = kernels.CUDNN(*tensors, None, True, 0.0, block.causal, False, scale=block.scale)
    return output, lse.squeeze(-1)


def _cudnn_backward(block: Block, grad: Tensor, output: Tensor, lse: Tensor) -> Gradients:
    query, key = block.query, block.key
    state = torch.empty((), dtype=torch.int64, device=query.device)
    grads: Gradients = kernels.CUDNN_BACKWARD(
        grad, query, key, block.value, output, lse.contiguous().unsqueeze(-1), state, state, None, None, None,
        query.shape[2], key.shape[2], 0.0, block.causal, scale=block.scale,
    )  # fmt: skip
    return grads


def _efficient(block: Block) -> tuple[Tensor, Tensor]:
    query, mask = block.query, block.visible()
    key, value = _repeated(block.key, query), _repeated(block.value, query)
    bias = _bias(query, mask)
    output, lse, *_ = kernels.EFFICIENT(query, key, value, bias, True, 0.0, block.causal, scale=block.scale)
    lse = lse[..., : query.shape[2]]  # the kernel's may be longer
    if mask is None:
        return output, lse
    blind = ~mask.any(-1)
    return output.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, -torch.inf)


def _efficient_backward(block: Block, grad: Tensor, output: Tensor, lse: Tensor) -> Gradients:
    # Weights are exp(score - lse): an infinite lse makes those of the padding and of blind queries zero.
    aligned = F.pad(_finite(lse, torch.inf), (0, -lse.shape[-1] % _LSE_MULTIPLE), value=torch.inf)
    # In half precision the kernel reads the output as [batch, q, heads, head_dim] in memory, whatever its strides say.
    output = output.transpose(1, 2).contiguous().transpose(1, 2)
    query, unused = block.query, torch.empty((), dtype=torch.int64, device=grad.device)
    grad_query, grad_key, grad_value, _ = kernels.EFFICIENT_BACKWARD(
        grad, query, _repeated(block.key, query), _repeated(block.value, query), _bias(query, block.visible()), output,
        aligned, unused, unused, 0.0, [True, True, True, False], block.causal, scale=block.scale,
    )  # fmt: skip
    return grad_query, _summed(grad_key, block.key), _summed(grad_value, block.value)


def _bias(query: Tensor, mask: Tensor | None) -> Tensor | None:
    """Return what the kernel adds to the scores, ``[batch, heads, q, kv]``, its rows aligned in memory."""
    if mask is None:
        return None
    width = mask.shape[-1]
    room = query.new_zeros(*mask.shape[:-1], width + -width % _BIAS_MULTIPLE)[..., :width]
    return room.masked_fill_(~mask, _HIDDEN).expand(-1, query.shape[1], -1, -1)


def _repeated(tensor: Tensor, query: Tensor) -> Tensor:
    repeats = query.shape[1] // tensor.shape[1]
    return tensor.repeat_interleave(repeats, dim=1) if repeats > 1 else tensor


def _summed(grad: Tensor, like: Tensor) -> Tensor:
    """Add the gradients of the heads that share a key head."""
    if grad.shape[1] == like.shape[1]:
        return grad
    return grad.unflatten(1, (like.shape[1], -1)).sum(2, dtype=wide_dtype(grad.dtype))


_KERNELS = {
    "math": (_math, _math_backward),
    "varlen": (_varlen, _varlen_backward),
    "cudnn": (_cudnn, _cudnn_backward),
    "flash": (_flash, _flash_backward),
    "efficient": (_efficient, _efficient_backward),
}
