"""The contract of a logger, and the group that keeps one failing backend from stopping a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from typing_extensions import override

from veomni.logging import create_logger, current_rank
from veomni.registry import Registry

logger = create_logger(__name__)

Metrics = Mapping[str, float | int | None]

LOGGERS: Registry[Callable[..., Logger]] = Registry("logger", group="veomni.loggers", home="veomni.loggers")
"""Loggers by the names that configurations use; each is called with the run's ``output_dir`` and its options."""


class Logger(ABC):
    """A place where the numbers of a run go.

    A logger opens its files and connections when it is first used, not when it is constructed: every rank may
    construct it, and only rank 0 uses it.

    Attributes:
        name: What messages call it.
        essential: Whether a run without it is not worth going on with.
    """

    name: ClassVar[str]
    essential: ClassVar[bool] = False

    @abstractmethod
    def log(self, metrics: Metrics, step: int) -> None:
        """Record numbers of one step.

        Args:
            metrics: By name; None is "not measured".
            step: Counted from 1 over the whole run.
        """

    def truncate_after(self, step: int) -> None:
        """Forget what was recorded for later steps: the run goes on from ``step``; to be called before :meth:`log`."""
        return

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Record the run's configuration, as nested plain values."""
        return

    def finalize(self, status: str) -> None:
        """Write what is buffered and close.

        Args:
            status: How the run ended: "finished", "preempted" or "failed".
        """
        return


class LoggerGroup(Logger):
    """Send everything to several loggers, on rank 0 only.

    A logger that raises is named in one warning and not used again; an essential one's error is passed on.
    """

    name = "group"

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._loggers = list(loggers) if current_rank() == 0 else []

    @override
    def log(self, metrics: Metrics, step: int) -> None:
        self._each(lambda backend: backend.log(metrics, step))

    @override
    def truncate_after(self, step: int) -> None:
        self._each(lambda backend: backend.truncate_after(step))

    @override
    def log_config(self, config: Mapping[str, Any]) -> None:
        self._each(lambda backend: backend.log_config(config))

    @override
    def finalize(self, status: str) -> None:
        self._each(lambda backend: backend.finalize(status))

    def _each(self, call: Callable[[Logger], None]) -> None:
        for backend in list(self._loggers):
            try:
                call(backend)
            except Exception as error:
                if backend.essential:
                    raise
                self._loggers.remove(backend)
                logger.warning_rank0(
                    "the %s logger failed and is switched off, training goes on: %s: %s",
                    backend.name,
                    type(error).__name__,
                    error,
                )
