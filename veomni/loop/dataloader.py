"""Any torch ``DataLoader`` as a loader of optimizer steps: dealt to data ranks, accumulated, resumable."""

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from veomni.errors import InputError
from veomni.logging import create_logger
from veomni.loop.dealing import Deal, is_ready
from veomni.loop.sampled_steps import SampledSteps
from veomni.loop.streamed_steps import StreamedSteps

logger = create_logger(__name__)

StepLoader = SampledSteps | StreamedSteps


def step_loader(
    loader: DataLoader[Any], parallel: tuple[int, int], *, seed: int, accumulate: int = 1, epochs: int = 1
) -> StepLoader:
    """Return the steps of a loader with any dataset, sampler, ``collate_fn`` and workers.

    Arguments are those of ``Launcher.setup_dataloader``; ``parallel`` is this process's place among the data ranks, and
    their number. An epoch without enough samples for a step is a DataError.
    """
    if not hasattr(loader, "dataset"):
        problem = f"setup_dataloader() was given a {type(loader).__name__}"
        raise InputError(problem, "give it torch.utils.data.DataLoader(dataset, batch_size=...)")
    if accumulate < 1 or epochs < 1:
        raise InputError(f"accumulate is {accumulate}, epochs {epochs}", "give numbers from 1 on")
    stream = isinstance(loader.dataset, IterableDataset)
    if stream and epochs > 1:
        problem = f"epochs is {epochs}, and the length of an iterable dataset is unknown"
        raise InputError(problem, "iterate once for each epoch")
    units = 1 if is_ready(loader) or loader.batch_size is None else loader.batch_size
    deal = Deal(*parallel, units, accumulate, loader.drop_last)
    return StreamedSteps(loader, deal) if stream else SampledSteps(loader, deal, seed=seed, epochs=epochs)


def warn_unsaved_loader(state: Mapping[str, Any], step: int) -> None:
    """Warn where a run that resumes past step 0 restores no position in its data."""
    if step and not any(hasattr(part, "state_dict") and hasattr(part, "__iter__") for part in state.values()):
        logger.warning_rank0(
            "resumed after step %s without the state of a loader: the data start from their beginning; fix: put the "
            "loader into the state (a torch DataLoader through launcher.setup_dataloader)",
            step,
        )
