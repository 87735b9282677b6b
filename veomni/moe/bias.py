"""Balance without a loss: the correction bias of experts moves towards equal load (arXiv:2408.15664, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

from veomni.errors import ModelError
from veomni.moe.routers import Router


def check_sharded_bias(router: Router, model: nn.Module) -> None:
    """Check that a correction bias can be moved now that ``model`` is sharded.

    Raises:
        ModelError: it has become a part of FSDP1's flat parameters.
    """
    if isinstance(_bias(router), nn.Parameter) and isinstance(model, FullyShardedDataParallel):
        raise ModelError(
            f"the correction bias of {router.name} is a parameter, and fsdp1 flattens parameters",
            "use FSDP2, or aux_loss_coef instead of bias_update_rate",
        )


@torch.no_grad()
def move_bias(router: Router, assignments: Tensor, rate: float) -> None:
    """Add ``rate`` to the bias of experts with less than the mean load, and take it from those with more.

    ``assignments``, int64 ``[experts]``, are the tokens sent to each expert in the step, over all ranks.
    """
    bias = _bias(router)
    below_mean = (assignments.sum() - assignments * len(assignments)).sign()  # in integers, so that equal is equal
    step = (rate * below_mean.to(bias.dtype)).view(bias.shape).to(bias.device)
    if isinstance(bias, DTensor):
        step = distribute_tensor(step, bias.device_mesh, bias.placements, src_data_rank=None)
    bias.add_(step)


def _bias(router: Router) -> Tensor:
    assert router.bias is not None
    bias: Tensor = getattr(*router.bias)
    return bias
