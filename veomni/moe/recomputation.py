"""Whether a forward is one of the model's, or activation checkpointing running it again."""

from __future__ import annotations

import torch


def recomputing() -> bool:
    """Whether this thread is inside a backward: a forward that runs now is recomputed, whoever checkpoints.

    ``torch.utils.checkpoint`` asks the autograd engine the same question to tell one backward from another.
    """
    return torch._C._current_graph_task_id() != -1
