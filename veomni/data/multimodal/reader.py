"""From a reference in a record to the bytes of a file, within one directory and without network unless allowed."""

import base64
import binascii
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veomni.data.multimodal.limits import DEFAULT_LIMITS, MediaLimits
from veomni.errors import MediaError

Fetch = Callable[[str], bytes]
"""Gets the bytes of a URL, or raises MediaError; decides which hosts and schemes are allowed."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DATA_URL = re.compile(r"data:[^,]*,", re.IGNORECASE)


@dataclass(frozen=True)
class MediaReader:
    """Reads media that records name.

    A reference is a path, a URL, a ``data:`` URL, bytes, or an object with one of ``bytes``, ``base64``, ``path`` or
    ``url`` (what ``datasets`` stores has ``bytes`` and ``path``; the bytes are taken).

    Attributes:
        root: Directory that paths are relative to; what lies outside, also through a symbolic link, is rejected
            (``/`` allows all).
        fetch: Gets URLs; None rejects them.
        limits: A file larger than ``max_bytes`` is rejected.
    """

    root: Path = Path()
    fetch: Fetch | None = None
    limits: MediaLimits = DEFAULT_LIMITS

    def __call__(self, reference: Any) -> tuple[str, bytes]:
        """Return a name for messages, and the content; MediaError if it is missing, not allowed, empty or too large."""
        name, content = self._read(reference)
        self.limits.check_bytes(name, len(content))
        return name, content

    def is_remote(self, reference: Any) -> bool:
        """Say whether a reference is a URL, which costs time to read again."""
        if isinstance(reference, Mapping):
            held = reference.get("bytes") is not None or reference.get("base64") is not None
            return not held and self.is_remote(reference.get("url") or reference.get("path"))
        return isinstance(reference, str) and _URL.match(reference) is not None

    def _read(self, reference: Any) -> tuple[str, bytes]:
        if isinstance(reference, Mapping):
            return self._from_object(reference)
        if isinstance(reference, bytes | bytearray | memoryview):
            return f"{len(reference)} bytes", bytes(reference)
        if not isinstance(reference, str | Path):
            raise MediaError(f"{type(reference).__name__} is no reference to media", "give a path, bytes or a URL")
        text = str(reference)
        if _DATA_URL.match(text):
            head, _, body = text.partition(",")
            if not head.lower().endswith(";base64"):
                raise MediaError(f"{head[:40]}: a data URL that is not base64", "encode it as base64")
            return head[:40], self._decode(head[:40], body)
        if not _URL.match(text):
            return text, self._from_file(text)
        if text.lower().startswith("file:"):
            raise MediaError(f"{text[:100]}: file URLs are not read", "give a path within root", "MediaReader.root")
        if self.fetch is None:
            raise MediaError(f"{text[:100]}: URLs are not allowed", "download it, or allow its host", "Fetch.url_hosts")
        return text, self.fetch(text)

    def _from_object(self, reference: Mapping[str, Any]) -> tuple[str, bytes]:
        path = reference.get("path")
        if reference.get("bytes") is not None:
            name, content = self._read(reference["bytes"])
            return (str(path) if path else name), content
        if reference.get("base64") is not None:
            return "base64", self._decode("base64", str(reference["base64"]))
        if given := reference.get("url") or path:
            return self._read(given)
        keys = ", ".join(sorted(map(str, reference))) or "none"
        raise MediaError(f"an object without media (keys: {keys})", "give it bytes, base64, path or url")

    def _decode(self, name: str, text: str) -> bytes:
        if len(text) > self.limits.max_bytes * 4 // 3 + 4:
            self.limits.check_bytes(name, len(text) * 3 // 4)
        try:
            return base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise MediaError(f"{name}: not base64 ({error})", "encode it again") from error

    def _from_file(self, text: str) -> bytes:
        root = self.root.resolve()
        try:
            path = (root / text).resolve()
            if not path.is_relative_to(root):
                fix = "set root to a directory that holds all media"
                raise MediaError(f"{text}: outside {root}", fix, "MediaReader.root")
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # a device or a pipe could be read for ever
                raise MediaError(f"{text}: not a regular file", "give a file")
            self.limits.check_bytes(text, status.st_size)
            return path.read_bytes()
        except (OSError, RuntimeError, ValueError) as error:  # loops of links, null bytes, permissions
            reason = getattr(error, "strerror", None) or str(error)
            raise MediaError(f"{text[:200]}: {reason} (in {root})", "correct root or the record") from error
