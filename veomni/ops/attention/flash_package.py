"""FlashAttention 3 or 4, where installed, in place of the FlashAttention 2 kernels that PyTorch comes with.

PyTorch replaces its own operations by those of a package, so nothing else changes: graphs, recomputation, the ring.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import attention

from veomni.errors import DeviceError
from veomni.logging import create_logger
from veomni.ops.attention.varlen import varlen_attention

logger = create_logger(__name__)

_MODULES = {"FA4": "flash_attn.cute", "FA3": "flash_attn_interface"}
_BOUND = 2e-2  # relative, between two kernels in bfloat16


def replace_flash_kernels(names: Sequence[str], device: torch.device) -> None:
    """Use the first of PyTorch's flash implementations (``FA4``, ``FA3``) that is installed, for the whole process.

    It computes a small example first: a package that does not fit this PyTorch, or is wrong, is reported and not used;
    it is a DeviceError where this PyTorch cannot undo the replacement.
    """
    if attention.current_flash_attention_impl() is not None:
        return
    for name in names:
        if name in attention.list_flash_attention_impls() and _is_installed(_MODULES[name]):
            reason = _try(name, device)
            if reason is None:
                return
            logger.warning("attention: %s is installed and not used: %s", name, reason)


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _try(name: str, device: torch.device) -> str | None:
    """Activate an implementation; say why that is not possible, or None."""
    expected = _example(device)
    try:
        attention.activate_flash_attention_impl(name)
        found = _example(device)
    except Exception as error:  # whatever a package raises that was built for another PyTorch
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
        if max(errors) <= _BOUND:
            return None
        reason = f"its results differ from PyTorch's by {max(errors):.1e}"
    if attention.current_flash_attention_impl() is not None:
        restore = getattr(attention, "restore_flash_attention_impl", None)  # the oldest supported release may lack it
        if restore is None:
            fix = f"set attention to varlen, or remove the package of {_MODULES[name]}"
            raise DeviceError(f"{name} is installed and does not work here: {reason}", fix, "build_model.attention")
        restore()
    return reason


def _example(device: torch.device) -> list[Tensor]:
    """Return the output for two documents with shared key heads, and its gradients, in float32."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 192, 128, generator=generator).to(device, torch.bfloat16).requires_grad_()
        for heads in (4, 2, 2)
    )
    boundaries = torch.tensor([0, 64, 192], dtype=torch.int32, device=device)
    output, _ = varlen_attention(nn.Module(), query, key, value, None, cu_seq_lens_q=boundaries, max_length_q=128)
    grads = torch.autograd.grad(output, (query, key, value), torch.ones_like(output))
    return [tensor.detach().float() for tensor in (output, *grads)]
