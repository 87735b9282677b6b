"""Units of ``fully_shard``: the modules that FSDP2 and expert parallelism gather and reduce as one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from veomni.batch.forward_call import ForwardCall
from veomni.models.adapter.adapter import InputPass, Stage
from veomni.strategies.base import SetupContext
from veomni.strategies.transforms.precision import Precision


class ShardedUnits(InputPass):
    """The units of a model. Those kept from a forward to its backward are freed after a forward that has none.

    What was left gathered would be used by the next forward, though an optimizer has changed the shards by then.
    """

    stage = Stage.PRECISION

    def __init__(self, context: SetupContext) -> None:
        offload = CPUOffloadPolicy(pin_memory=context.accelerator.supports_pinned_memory)
        self.offload_policy = offload if context.parameters.cpu_offload else OffloadPolicy()
        self._kept: list[FSDPModule] = []
        self._until_the_end: list[FSDPModule] = []
        self._keep = True

    def add(
        self, module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy, *, reshard: bool, **options: Any
    ) -> FSDPModule:
        """Shard ``module`` over the last axis of ``mesh``; ``reshard`` frees its parameters after every forward."""
        unit = fully_shard(
            module, mesh=mesh, mp_policy=policy, offload_policy=self.offload_policy, reshard_after_forward=reshard,
            **options,
        )  # fmt: skip
        if mesh.size(mesh.ndim - 1) == 1:
            unit.set_custom_reduce_scatter(OneBuffer())  # type: ignore[arg-type]
        if not reshard:
            self._kept.append(unit)
        return unit

    def add_embedding(
        self, module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy, *, reshard: bool
    ) -> None:
        """Shard a lookup table, whose backward reads indices and no values: it is not gathered for it."""
        self.add(module, mesh, policy, reshard=reshard).set_unshard_in_backward(False)

    def add_head(self, module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
        """Shard a head, whose weight a loss may read after the head's forward: it stays for the rest of the model's."""
        unit = self.add(module, mesh, policy, reshard=False)
        self._kept.remove(unit)
        self._until_the_end.append(unit)

    def before(self, call: ForwardCall) -> None:
        """Keep parameters gathered only where a backward may follow."""
        keep = torch.is_grad_enabled()
        if keep is not self._keep:
            self._keep = keep
            for unit in self._kept:
                unit.set_reshard_after_forward(not keep, recurse=False)

    def close(self, call: ForwardCall) -> None:
        """Free heads where no backward follows, which frees them otherwise."""
        for unit in self._until_the_end if not torch.is_grad_enabled() else ():
            unit.reshard()


def cast_policy(precision: Precision, *, cast_inputs: bool = True) -> MixedPrecisionPolicy:
    """Return the formats that a unit gathers and reduces in."""
    if not precision.mixed:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(precision.compute, precision.reduce, cast_forward_inputs=cast_inputs)


class OneBuffer:
    """FSDP2's interface of a reduce-scatter for a unit that one rank holds: both ends of it are one buffer.

    FSDP2 copies there from one to the other, 8 bytes a parameter. Experts are such a unit where as many ranks share the
    experts as share the parameters. The input is allocated first, then the output.
    """

    def __init__(self) -> None:
        self._input: Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the input again, for an output of its size and dtype; else a new buffer."""
        buffer, self._input = self._input, None
        if buffer is not None and list(buffer.shape) == list(size) and buffer.dtype is dtype:
            return buffer
        self._input = torch.empty(tuple(size), dtype=dtype, device=device)
        return self._input

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, **options: Any) -> None:
        """Leave values where they are; copy them only to another buffer."""
        if output_tensor is not input_tensor:
            output_tensor.copy_(input_tensor)
