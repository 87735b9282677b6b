"""Whether a forward is one of the model's, or activation checkpointing running it again."""

from __future__ import annotations

import torch

from veomni.compat.private_name import PrivateName

PRIVATE = (PrivateName("torch:_C._current_graph_task_id", "distinguishes a recomputed forward", "AttributeError"),)


def in_backward() -> bool:
    """Whether this thread is inside a backward: a forward that runs now is recomputed.

    ``torch.utils.checkpoint`` reads the same from the autograd engine to distinguish backward passes.
    """
    return torch._C._current_graph_task_id() != -1
