"""Where data lies: files on this machine, or behind a URL that fsspec knows (s3, gs, http, hf, memory ...)."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import numpy as np

from veomni.data.sources.build_once import build_once
from veomni.errors import DataError
from veomni.logging import create_logger

logger = create_logger(__name__)

T = TypeVar("T")

_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
_SAMPLED, _SAMPLE_BYTES = 32, 1 << 12


@dataclass(frozen=True)
class DataFile:
    """A file with data.

    Attributes:
        place: Path or URL, as it is opened.
        size: Bytes.
        relative: Its name within the directory that was given; what two copies of a data set have in common.
    """

    place: str
    size: int
    relative: str

    @property
    def path(self) -> Path | None:
        """The path on this machine, or None."""
        return None if is_url(self.place) else Path(self.place)

    @property
    def compression(self) -> str | None:
        """How it is compressed: what its last suffix says."""
        return _COMPRESSED.get(PurePosixPath(self.relative).suffix.lower())

    @property
    def suffix(self) -> str:
        """The suffix of the data format, without that of compression."""
        name = PurePosixPath(self.relative)
        return (name.with_suffix("") if self.compression else name).suffix.lower()

    def __str__(self) -> str:
        return shown(self.place)

    def open(self) -> BinaryIO:
        """Open the file as it is, for reading; it can seek."""
        if self.path is not None:
            return self.path.open("rb")
        system, path = _file_system(self.place)
        return _reading(lambda: system.open(path, "rb"), self.place)

    def open_whole(self) -> BinaryIO:
        """Open what is in it, decompressed, to be read once from start to end."""
        import fsspec

        return _reading(lambda: fsspec.open(self.place, "rb", compression=self.compression).open(), self.place)

    def digest(self) -> str:
        """Return a digest of size and of samples of the content; of a URL, of the metadata of its file system."""
        hashed = hashlib.blake2b(str(self.size).encode(), digest_size=16)
        if self.path is None:
            system, path = _file_system(self.place)
            facts = _reading(lambda: system.info(path), self.place)
            facts = {key: str(facts[key]) for key in ("ETag", "etag", "md5Hash", "checksum", "sha256") if key in facts}
            hashed.update(repr(sorted(facts.items())).encode())
            return hashed.hexdigest()
        with self.open() as file:
            for at in np.linspace(0, max(0, self.size - _SAMPLE_BYTES), _SAMPLED).astype(int).tolist():
                file.seek(at)
                hashed.update(file.read(_SAMPLE_BYTES))
        return hashed.hexdigest()

    def copy_to(self, path: Path) -> None:
        """Write what is in it, decompressed, to a file on this machine."""
        with self.open_whole() as source, path.open("wb") as copy:
            _reading(lambda: shutil.copyfileobj(source, copy, 1 << 22), self.place)

    def kept_copy(self, cache_dir: Path) -> Path:
        """Return a copy on this machine that stays in ``cache_dir``, made once; the file itself if it needs none."""
        if self.path is not None and self.compression is None:
            return self.path
        name = hashlib.blake2b(f"{self.place}\n{self.digest()}".encode(), digest_size=16).hexdigest()
        file = PurePosixPath(self.relative).name
        file = file[: -len(PurePosixPath(file).suffix)] if self.compression else file

        def fetch(directory: Path) -> None:
            logger.info("copying %s to %s", self, cache_dir)
            self.copy_to(directory / file)

        build_once(
            cache_dir / "files" / name, fetch, lambda found: None if (found / file).is_file() else "file missing"
        )
        return cache_dir / "files" / name / file

    def passing_copy(self, use: Callable[[Path], T]) -> T:
        """Return what ``use`` makes of a copy on this machine that is removed at once: it must keep the file open."""
        if self.path is not None and self.compression is None:
            return use(self.path)
        with tempfile.TemporaryDirectory(prefix="veomni-") as directory:
            copy = Path(directory) / f"data{self.suffix}"
            self.copy_to(copy)
            return use(copy)


def is_url(path: str) -> bool:
    """Whether a path is one that fsspec opens; ``file://`` is a path on this machine."""
    return "://" in path and not path.startswith("file://")


def local_path(path: str) -> Path:
    """Return a path on this machine as one, without ``file://``."""
    return Path(path.removeprefix("file://")).expanduser()


def shown(place: str) -> str:
    """Return a path or URL without what may be secret: user, password and query."""
    if not is_url(place):
        return place
    parts = urlsplit(place)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def local_file(path: Path, root: Path | None = None) -> DataFile:
    """Return a file on this machine, named relative to ``root``."""
    return DataFile(str(path), path.stat().st_size, path.relative_to(root).as_posix() if root else path.name)


def remote_files(url: str) -> list[DataFile]:
    """Return the files a URL stands for, sorted: itself, those that match its pattern, or all below it.

    Raises:
        DataError: there are none, they cannot be reached, or the package for this kind of URL is not installed.
    """
    system, path = _file_system(url)

    def listed() -> dict[str, Any]:
        if "*" in path:
            found: dict[str, Any] = system.glob(path, detail=True)
            return found
        facts = system.info(path)
        return {path: facts} if facts["type"] == "file" else system.find(path, detail=True)

    found = {name: facts for name, facts in _reading(listed, url).items() if facts["type"] == "file"}
    if not found:
        raise DataError(f"{shown(url)}: no file there", "correct the URL")
    unsized = [name for name, facts in found.items() if not isinstance(facts.get("size"), int)]
    if unsized:
        raise DataError(f"{shown(url)}: the server does not say how large {unsized[0]} is", "download it, give a path")
    root = path if len(found) > 1 and "*" not in path else path.rpartition("/")[0]
    query = urlsplit(url).query and len(found) == 1  # a signed URL is kept as it is
    return [
        DataFile(url if query else system.unstrip_protocol(name), facts["size"],
                 name.removeprefix(root).lstrip("/").partition("?")[0])
        for name, facts in sorted(found.items())
    ]  # fmt: skip


def _file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    # Created on every call: connections do not survive a fork, and fsspec keeps one per process.
    found: tuple[Any, str] = _reading(lambda: url_to_fs(url), url)
    return found


def _reading(read: Callable[[], T], place: str) -> T:
    try:
        return read()
    except ImportError as error:
        raise DataError(f"{shown(place)}: {error}", "install that package, or give a path on this machine") from error
    except FileNotFoundError as error:
        raise DataError(f"{shown(place)} does not exist", "correct the URL") from error
    except (OSError, ValueError, EOFError) as error:
        reason = str(error).replace(place, shown(place))
        raise DataError(f"{shown(place)}: cannot be read: {reason}", "check access, network and the file") from error
