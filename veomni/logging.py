"""Loggers by rank: one clear line from rank 0, or one line per process, never a flood."""

import logging
import os
import sys

_FORMAT = "[%(asctime)s %(levelname).1s rank%(rank)s %(name)s] %(message)s"
warned_once: set[str] = set()


def current_rank() -> int:
    """Return the global rank of this process from the launcher's environment; 0 before a launch."""
    return int(os.environ.get("RANK", "0"))


class RankLogger(logging.LoggerAdapter[logging.Logger]):
    """A standard logger with rank-aware verbs."""

    def info_rank0(self, message: object, *args: object) -> None:
        """Log at INFO level on rank 0 only."""
        if current_rank() == 0:
            self.info(message, *args)

    def warning_rank0(self, message: object, *args: object) -> None:
        """Log at WARNING level on rank 0 only."""
        if current_rank() == 0:
            self.warning(message, *args)

    def warning_once(self, message: str, *args: object) -> None:
        """Log a warning the first time this process says exactly this, on rank 0 only."""
        text = message % args if args else message
        if text not in warned_once:
            warned_once.add(text)
            self.warning_rank0("%s", text)


def _with_rank(record: logging.LogRecord) -> bool:
    record.rank = current_rank()
    return True


def create_logger(name: str) -> RankLogger:
    """Return a logger under ``veomni`` for a module's ``__name__`` (scripts' ``__main__`` included)."""
    root = logging.getLogger("veomni")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.addFilter(_with_rank)
        handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%H:%M:%S"))
        root.addHandler(handler)
        root.setLevel(os.environ.get("VEOMNI_LOG_LEVEL", "INFO"))
        root.propagate = False
    return RankLogger(logging.getLogger(name if name.startswith("veomni") else f"veomni.{name}"))
