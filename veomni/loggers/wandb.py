"""Weights & Biases, online or in a folder."""

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import MinLen
from typing_extensions import override

from veomni.errors import ConfigError, MissingExtraError
from veomni.loggers.base import LOGGERS, Logger, Metrics
from veomni.loggers.redact import redact


@LOGGERS.register("wandb")
class WandbLogger(Logger):
    """Send metrics to a Weights & Biases run, or write it to ``<output_dir>/wandb`` for a later ``wandb sync``.

    The key is read from the environment variable ``WANDB_API_KEY`` only. The configuration is sent without its
    secrets; the console, the command line, the code and the repository's address are not sent.

    Args:
        output_dir: Directory that wandb makes its folder in.
        project: Project that the run belongs to.
        mode: offline writes <output_dir>/wandb only; online sends it, and needs WANDB_API_KEY in the environment.
        run_name: What wandb calls the run; null lets wandb choose.
        entity: User or team that the project belongs to; null is the key's own.
        group: Group of runs that this one belongs to.
        tags: Labels of the run.
        run_id: Identifier of an earlier run to continue.
    """

    name = "wandb"

    def __init__(
        self,
        output_dir: Path | str,
        *,
        project: Annotated[str, MinLen(1)] = "veomni",
        mode: Literal["online", "offline"] = "offline",
        run_name: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        run_id: str | None = None,
    ) -> None:
        MissingExtraError.check("wandb", "dev")
        if mode == "online" and not os.environ.get("WANDB_API_KEY"):
            problem, fix = "wandb's mode is online but WANDB_API_KEY is not set", "export it, or use mode offline"
            raise ConfigError(problem, fix, "WandbLogger.mode")
        self._output_dir = Path(output_dir)
        self._options: dict[str, Any] = {
            "project": project, "mode": mode, "name": run_name, "entity": entity, "group": group,
            "tags": list(tags) or None, "id": run_id, "resume": None if run_id is None else "allow",
        }  # fmt: skip

    @cached_property
    def _run(self) -> Any:
        import wandb

        self._output_dir.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            console="off", save_code=False, disable_git=True, x_disable_meta=True, x_save_requirements=False
        )
        return wandb.init(dir=str(self._output_dir), settings=settings, **self._options)

    @override
    def log(self, metrics: Metrics, step: int) -> None:
        self._run.log({key: value for key, value in metrics.items() if value is not None}, step=step)

    @override
    def log_config(self, config: Mapping[str, Any]) -> None:
        self._run.config.update(redact(config))

    @override
    def finalize(self, status: str) -> None:
        if run := vars(self).pop("_run", None):
            run.finish(exit_code=1 if status == "failed" else 0)
