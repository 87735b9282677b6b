"""Gathered parameters are freed after a forward that has no backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch.distributed.fsdp import FSDPModule

from veomni.batch.forward_call import ForwardCall
from veomni.models.adapter.adapter import InputPass, Stage


class FreeWithoutBackward(InputPass):
    """Free, after a forward without gradients, what stays gathered from a forward to its backward otherwise.

    What was left gathered would be used by the next forward, though an optimizer has changed the shards by then.

    Args:
        units: Modules that ``fully_shard`` took, and whether each frees its parameters after every forward.
    """

    stage: ClassVar[Stage] = Stage.PRECISION

    def __init__(self, units: Mapping[FSDPModule, bool]) -> None:
        self.units = [unit for unit, reshard in units.items() if not reshard]
        self._keep = True

    def before(self, call: ForwardCall) -> None:
        """Keep parameters gathered only where a backward may follow."""
        keep = torch.is_grad_enabled()
        if keep is not self._keep:
            self._keep = keep
            for unit in self.units:
                unit.set_reshard_after_forward(not keep, recurse=False)
