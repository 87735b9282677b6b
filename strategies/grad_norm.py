"""The 2-norm of sharded gradients, each parameter counted once, with collectives that do not depend on a rank's own."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from veomni.compat.tensors import multiply, norms
from veomni.errors import LoopError, NonFiniteError
from veomni.ops.host_copy import HostCopy
from veomni.parallel.wrappers import local_shard, wide_dtype


@torch.no_grad()  # else a shard of a DTensor is the output of an autograd function
def sharded_grad_norm(
    parameters: Iterable[nn.Parameter], device: torch.device, flat: ProcessGroup | None = None
) -> Tensor:
    """Return the global gradient norm of DTensor and plain parameters, over any mix of meshes and placements.

    Groups are formed from the parameters, not from the gradients a rank happens to have, and only scalars are
    exchanged: every rank runs the same collectives. Replicated mesh axes are not summed over, frozen parameters do not
    count. ``flat`` are the ranks that plain parameters are sharded over; None where every rank holds them whole.
    """
    groups: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]] = defaultdict(list)
    wide = torch.float32
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        wide = wide_dtype(parameter.dtype)
        members = groups[sharding_of(parameter)]
        if parameter.grad is not None:
            members.append(local_shard(parameter.grad))
    total = torch.zeros((), device=device, dtype=wide)
    for (mesh, sharded_axes), gradients in groups.items():
        part = _square_sum(gradients, device).to(wide)
        shards = [flat] if mesh is None else [mesh.get_group(axis) for axis in sharded_axes]
        for group in shards:
            if group is not None:
                dist.all_reduce(part, group=group)
        total += part
    return total.sqrt()


def _square_sum(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return the sum of squares of local tensors as a 0-d tensor on ``device``, in float32 or better."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        if gradient.numel():
            by_kind[gradient.device, gradient.dtype].append(gradient)
    parts = [torch.stack(norms(each, wide_dtype(dtype))).to(device) for (_, dtype), each in by_kind.items()]
    return torch.cat(parts).square().sum() if parts else torch.zeros((), device=device)


def sharding_of(parameter: nn.Parameter) -> tuple[DeviceMesh | None, tuple[int, ...]]:
    """Return the mesh of a parameter and the axes it is sharded over; replicated axes are left out."""
    if not isinstance(parameter, DTensor):
        return None, ()
    axes = tuple(axis for axis, placement in enumerate(parameter.placements) if isinstance(placement, Shard))
    return parameter.device_mesh, axes


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients by ``min(1, max_norm / norm)``; a LoopError where ``max_norm`` is not above 0.

    A ``norm`` that is not finite is a NonFiniteError, and gradients stay as they are: it is equal on all ranks, so all
    of them raise and none steps.
    """
    if not max_norm > 0:
        raise LoopError(f"clip_grad_norm() was given max_norm {max_norm}", "give more than 0; math.inf only measures")
    by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = local_shard(parameter.grad)
            by_device[gradient.device].append(gradient)
    found = HostCopy(norm)
    coefficient = torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)
    for device, gradients in by_device.items():
        multiply(gradients, coefficient.to(device))
    # A loop may catch the error and leave the step out, so the host waits here; meanwhile the device scales.
    if not math.isfinite(value := found.read().item()):
        raise NonFiniteError(
            f"the gradient norm is {value}: no rank takes the step and no parameter changed; "
            "look at the last batch, the learning rate and the precision"
        )
