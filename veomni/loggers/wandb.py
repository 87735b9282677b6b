"""Weights & Biases, online or in a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from typing_extensions import override

from veomni.errors import ConfigError, MissingExtraError
from veomni.loggers.base import Logger, Metrics
from veomni.loggers.redact import redact


class WandbLogger(Logger):
    """Send metrics to a Weights & Biases run, or write it to ``<output_dir>/wandb`` for a later ``wandb sync``.

    The key is read from the environment variable ``WANDB_API_KEY`` only. The configuration is sent without its
    secrets; the console, the command line, the code and the repository's address are not sent.

    Args:
        output_dir: Directory that wandb makes its folder in.
        project: The project that the run belongs to.
        mode: "offline" sends nothing.

    Raises:
        MissingExtraError: wandb is not installed.
        ConfigError: the mode is "online" and there is no key.
    """

    name = "wandb"

    def __init__(self, output_dir: Path | str, *, project: str, mode: Literal["online", "offline"]) -> None:
        if find_spec("wandb") is None:
            raise MissingExtraError("wandb", "dev")
        if mode == "online" and not os.environ.get("WANDB_API_KEY"):
            raise ConfigError(
                "train.logging.wandb_mode is online but WANDB_API_KEY is not set",
                "export WANDB_API_KEY, or set train.logging.wandb_mode to offline",
            )
        self._output_dir = Path(output_dir)
        self._project, self._mode = project, mode
        self._run: Any = None

    @override
    def log(self, metrics: Metrics, step: int) -> None:
        self._started().log({key: value for key, value in metrics.items() if value is not None}, step=step)

    @override
    def log_config(self, config: Mapping[str, Any]) -> None:
        self._started().config.update(redact(config))

    @override
    def finalize(self, status: str) -> None:
        if self._run is not None:
            self._run.finish(exit_code=1 if status == "failed" else 0)
            self._run = None

    def _started(self) -> Any:
        if self._run is None:
            import wandb

            self._output_dir.mkdir(parents=True, exist_ok=True)
            settings = wandb.Settings(
                console="off", save_code=False, disable_git=True, x_disable_meta=True, x_save_requirements=False
            )
            self._run = wandb.init(project=self._project, dir=str(self._output_dir), mode=self._mode, settings=settings)
        return self._run
