"""Read the weights of a checkpoint without the model: for export, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from veomni.checkpoint.manifest import content_problem, read_manifest, structure_problem
from veomni.checkpoint.safe_storage import SafePlanner, SafeReader
from veomni.errors import CheckpointError

WEIGHTS = "weights"


def read_model_tensors(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield names and whole tensors of the model, one at a time.

    Args:
        checkpoint: A published ``global_step_N`` directory.

    Raises:
        CheckpointError: it is damaged, or no checkpoint.
    """
    from torch.distributed.checkpoint.state_dict_loader import load

    manifest = read_manifest(checkpoint)
    if manifest is None:
        raise CheckpointError(f"{checkpoint} has no valid manifest", "give a global_step_N directory of a run")
    problem = structure_problem(checkpoint, manifest) or content_problem(checkpoint, manifest, 0, 1)
    if problem:
        raise CheckpointError(f"{checkpoint}: {problem}", "use another checkpoint")
    directory = checkpoint / WEIGHTS
    entries = SafeReader(directory).read_metadata().state_dict_metadata
    for name, entry in entries.items():
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata):
            table = {name: torch.empty(entry.size, dtype=entry.properties.dtype)}
            load(table, storage_reader=SafeReader(directory), planner=SafePlanner(), no_dist=True)
            yield name.removeprefix("model."), table[name]
