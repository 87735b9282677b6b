"""The contract of a logger, and the group that keeps one failing backend from stopping a run."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from veomni.logging import create_logger, current_rank
from veomni.registry import Registry

logger = create_logger(__name__)

Metrics = Mapping[str, float | int | None]


class Logger(ABC):
    """A place where the numbers of a run go.

    A logger opens its files and connections when it is first used, not when it is constructed: every rank may
    construct it, and only rank 0 uses it.

    Attributes:
        name: What messages call it.
        essential: Whether its error ends the run.
    """

    name: ClassVar[str]
    essential: ClassVar[bool] = False

    @abstractmethod
    def log(self, metrics: Metrics, step: int) -> None:
        """Record numbers of a step, counted from 1 over the whole run; None is "not measured"."""

    def log_expert_load(self, tokens: Mapping[str, Sequence[int]], step: int) -> None:
        """Record the tokens of a step that were dispatched to each expert, by router."""
        return

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Record the run's configuration, as nested plain values."""
        return

    def truncate_after(self, step: int) -> None:
        """Drop what was recorded for later steps: the run resumes from ``step``; called before :meth:`log`."""
        return

    def finalize(self, status: str) -> None:
        """Write what is buffered and close; the run is "finished", "preempted" or "failed"."""
        return


LOGGERS: Registry[Callable[..., Logger]] = Registry("logger", group="veomni.loggers", home="veomni.loggers")
"""Loggers by the names that configurations use; each is called with the run's ``output_dir`` and its options."""


class LoggerGroup:
    """Calls loggers on rank 0; one that raises is named in a warning and dropped, unless it is essential."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._loggers = list(loggers)

    def each(self, call: Callable[[Logger], None]) -> None:
        """Call every logger that is in use."""
        for backend in list(self._loggers) if current_rank() == 0 else []:
            try:
                call(backend)
            except Exception as error:
                if backend.essential:
                    raise
                self._loggers.remove(backend)
                found = f"{type(error).__name__}: {error}"
                logger.warning_rank0(
                    "the %s logger failed and is switched off, training continues: %s", backend.name, found
                )
