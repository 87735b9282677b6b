"""TensorBoard event files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from veomni.errors import MissingExtraError
from veomni.loggers.base import LOGGERS, Logger, Metrics
from veomni.loggers.redact import redact

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@LOGGERS.register("tensorboard")
class TensorBoardLogger(Logger):
    """Write metrics to ``<output_dir>/tensorboard``, and the configuration, without its secrets, as text.

    Args:
        output_dir: The run's directory.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    name = "tensorboard"

    def __init__(self, output_dir: Path | str) -> None:
        MissingExtraError.check("tensorboard", "dev")
        self._folder = Path(output_dir) / "tensorboard"
        self._purge_step: int | None = None
        self._writer: SummaryWriter | None = None

    @override
    def truncate_after(self, step: int) -> None:
        """Have TensorBoard hide what earlier event files hold for later steps."""
        self._purge_step = step + 1

    @override
    def log(self, metrics: Metrics, step: int) -> None:
        for key, value in metrics.items():
            if value is not None:
                self._started().add_scalar(key, value, global_step=step)

    @override
    def log_config(self, config: Mapping[str, Any]) -> None:
        text = json.dumps(redact(config), indent=2, default=str)
        self._started().add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), global_step=0)

    @override
    def finalize(self, status: str) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _started(self) -> SummaryWriter:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(log_dir=str(self._folder), purge_step=self._purge_step)
        return self._writer
