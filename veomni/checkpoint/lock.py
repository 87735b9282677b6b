"""One job per checkpoint directory. The kernel lets go of the lock when its holder dies, however it dies."""

from __future__ import annotations

import os
import socket
from pathlib import Path


class DirectoryLock:
    """An exclusive lock on a directory, with the holder's host and process id in it for people to read.

    Args:
        directory: Is made when it is not there.
    """

    def __init__(self, directory: Path) -> None:
        from filelock import FileLock

        self._directory = directory
        self._holder = directory / ".holder"
        self._lock = FileLock(directory / ".lock")

    def acquire(self) -> str | None:
        """Take the lock; return who holds it when somebody else does, or why it cannot be taken."""
        from filelock import Timeout

        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            self._holder.write_text(f"{socket.gethostname()} pid {os.getpid()}")
        except Timeout:
            return f"{self._directory} is used by another job: {self._holder_text()}"
        except OSError as error:
            return f"{self._directory} cannot be used: {error}"
        return None

    def _holder_text(self) -> str:
        try:
            return self._holder.read_text()
        except OSError:
            return "unknown"

    def release(self) -> None:
        """Let go of the lock."""
        if self._lock.is_locked:
            self._holder.unlink(missing_ok=True)
            self._lock.release()
