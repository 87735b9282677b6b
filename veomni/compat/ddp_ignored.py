"""Parameters that DistributedDataParallel leaves alone."""

from __future__ import annotations

from collections.abc import Set

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from veomni.compat.private_name import PrivateName

PRIVATE = (
    PrivateName(
        "torch.nn.parallel:DistributedDataParallel._set_params_and_buffers_to_ignore_for_model",
        reason="parameters that are shards, as experts on several ranks are, must not be broadcast and averaged",
        without="DDP beside expert parallelism is not possible: it would overwrite every rank's experts by rank 0's",
        parameters=("module", "params_and_buffers_to_ignore"),
    ),
)


def ignore_parameters(model: nn.Module, parameters: Set[nn.Parameter]) -> None:
    """Exclude parameters from the gradient averages and broadcasts of the DDP around ``model``."""
    names = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter in parameters]
    if names:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
