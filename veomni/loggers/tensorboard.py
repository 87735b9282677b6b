"""TensorBoard event files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
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
    """Write metrics to ``<output_dir>/tensorboard``, and the configuration, without its secrets, as text."""

    name = "tensorboard"

    def __init__(self, output_dir: Path | str) -> None:
        MissingExtraError.check("tensorboard", "dev")
        self._folder = Path(output_dir) / "tensorboard"
        self._purge_step: int | None = None

    @cached_property
    def _writer(self) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(log_dir=str(self._folder), purge_step=self._purge_step)

    @override
    def truncate_after(self, step: int) -> None:
        self._purge_step = step + 1  # TensorBoard hides what earlier event files hold for later steps

    @override
    def log(self, metrics: Metrics, step: int) -> None:
        for key, value in metrics.items():
            if value is not None:
                self._writer.add_scalar(key, value, global_step=step)

    @override
    def log_config(self, config: Mapping[str, Any]) -> None:
        text = json.dumps(redact(config), indent=2, default=str)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), global_step=0)

    @override
    def finalize(self, status: str) -> None:
        if writer := vars(self).pop("_writer", None):
            writer.close()
