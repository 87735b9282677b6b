"""What a run tells people: the progress bar, ``metrics.jsonl`` and other loggers, times and FLOPs, a plot at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

from veomni.accelerators import Accelerator
from veomni.batch import StepBatch
from veomni.logging import create_logger, current_rank

if TYPE_CHECKING:
    from veomni.loggers import Logger
    from veomni.metrics import FlopsCounter, Progress, Throughput
    from veomni.precision import Precision

logger = create_logger(__name__)


class Reporter:
    """Collect the numbers of a step and send them where they belong; files and bars on rank 0 only.

    Args:
        output_dir: Where ``metrics.jsonl`` and ``loss.png`` go; None writes neither.
        loggers: Further loggers (wandb, TensorBoard).
        progress_bar: Show a bar on a terminal, plain lines elsewhere.
        log_every: Report every so many steps.
        plot: Draw ``loss.png`` when the run ends.
    """

    def __init__(
        self,
        output_dir: Path | str | None = None,
        *,
        loggers: Sequence[Logger] = (),
        progress_bar: bool = False,
        log_every: int = 1,
        plot: bool = False,
    ) -> None:
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.log_every, self.plot = log_every, plot
        self._progress_bar = progress_bar
        self._extra_loggers = list(loggers)
        self._loggers: list[Logger] | None = None
        self._flops: FlopsCounter | None = None
        self._throughput: Throughput | None = None
        self._progress: Progress | None = None

    @property
    def _active(self) -> bool:
        return self.output_dir is not None or bool(self._extra_loggers) or self._progress_bar

    def describe_model(self, model: nn.Module, accelerator: Accelerator, precision: Precision) -> None:
        """Count the model's FLOPs while it is whole, and look up what the device can do."""
        if not self._active:
            return
        from veomni.metrics import FlopsCounter, Throughput

        self._flops = FlopsCounter.from_model(model)
        self._throughput = Throughput(
            peak_flops=accelerator.peak_flops(precision.compute), peak_memory=accelerator.peak_memory
        )
        accelerator.reset_peak_memory()

    def start(self, step: int, total: int | None, accelerator: Accelerator) -> None:
        """Begin to show progress from ``step`` towards ``total``."""
        if self._progress_bar and current_rank() == 0:
            from veomni.metrics import Progress

            self._progress = Progress(total=total, initial=step)

    def begin_step(self) -> None:
        """Start the clock of a step: what comes first is waiting for data."""
        if self._throughput is not None:
            self._throughput.start_step()

    def mark(self, section: str) -> None:
        """End a section of the step on the clock ("data", "compute")."""
        if self._throughput is not None:
            self._throughput.mark(section)

    def finish(self) -> None:
        return None

    def close(self, status: str) -> None:
        return None

    def resume_from(self, step: int) -> None:
        return None
