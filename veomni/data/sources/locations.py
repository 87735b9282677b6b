"""Where data lies: files on this machine, or behind a URL that fsspec opens (s3, gs, http, hf, memory ...)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from veomni.data.sources.cache import build_once, digest, lacks, sampled_digest
from veomni.errors import DataError
from veomni.logging import create_logger

logger = create_logger(__name__)

T = TypeVar("T")

_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
_SAMPLES, _SAMPLE_BYTES = 32, 1 << 12


@dataclass(frozen=True)
class DataFile:
    """A file with data at a path or URL, of ``size`` bytes; messages use its ``name``, where empty its ``place``.

    ``relative`` is its name within the directory that was given; what two copies of a data set have in common.
    """

    place: str
    size: int
    relative: str
    name: str = ""

    @property
    def path(self) -> Path | None:
        """The path on this machine, or None."""
        return None if is_url(self.place) else Path(self.place)

    @property
    def compression(self) -> str | None:
        """How it is compressed: what its last suffix says."""
        return _COMPRESSED.get(PurePosixPath(self.relative).suffix.lower())

    @property
    def plain(self) -> PurePosixPath:
        """Its relative name without the suffix of compression."""
        name = PurePosixPath(self.relative)
        return name.with_suffix("") if self.compression else name

    @property
    def suffix(self) -> str:
        """The suffix of the data format."""
        return self.plain.suffix.lower()

    def __str__(self) -> str:
        return shown(self.name or self.place)

    def open(self) -> BinaryIO:
        """Open the file as it is, for reading; it can seek."""
        if self.path is not None:
            return self.path.open("rb")
        system, path = _file_system(self.place)
        return _reading(lambda: system.open(path, "rb"), self.place)

    def content(self) -> bytes:
        """Return what is in it, decompressed."""
        with self._open_decompressed() as file:
            return _reading(file.read, self.place)

    def digest(self) -> str:
        """Return a digest of size and of samples of the content; of a URL, of the metadata of its file system."""
        if self.path is not None:
            return sampled_digest(self.path, _SAMPLES, _SAMPLE_BYTES)
        system, path = _file_system(self.place)
        facts = _reading(lambda: system.info(path), self.place)
        names = ("ETag", "etag", "md5Hash", "checksum", "sha256")
        return digest([self.size, {name: str(facts[name]) for name in names if name in facts}])

    def kept_copy(self, cache_dir: Path) -> DataFile:
        """Return a copy on this machine that stays in ``cache_dir``, made once; the file itself if it needs none."""
        if self.path is not None and self.compression is None:
            return self
        directory = cache_dir / "files" / digest([self.place, self.digest()])

        def fetch(empty: Path) -> None:
            logger.info("copying %s to %s", self, cache_dir)
            self._copy_to(empty / self.plain.name)

        build_once(directory, fetch, lacks(self.plain.name))
        return self._copied(directory / self.plain.name)

    def passing_copy(self, use: Callable[[DataFile], T]) -> T:
        """Return what ``use`` makes of a copy on this machine that is removed at once: it must keep the file open."""
        if self.path is not None and self.compression is None:
            return use(self)
        with tempfile.TemporaryDirectory(prefix="veomni-") as directory:
            self._copy_to(path := Path(directory) / f"data{self.suffix}")
            return use(self._copied(path))

    def _copied(self, path: Path) -> DataFile:
        return DataFile(str(path), path.stat().st_size, self.plain.as_posix(), str(self))

    def _copy_to(self, path: Path) -> None:
        with self._open_decompressed() as source, path.open("wb") as copy:
            _reading(lambda: shutil.copyfileobj(source, copy, 1 << 22), self.place)

    def _open_decompressed(self) -> BinaryIO:
        import fsspec

        return _reading(lambda: fsspec.open(self.place, "rb", compression=self.compression).open(), self.place)


def is_url(path: str) -> bool:
    """Whether a path is one that fsspec opens; ``file://`` is a path on this machine."""
    return "://" in path and not path.startswith("file://")


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

    DataError where there are none, they cannot be reached, or the package for this kind of URL is not installed.
    """
    system, path = _file_system(url)

    def listed() -> dict[str, Any]:
        if "*" in path:
            matching: dict[str, Any] = system.glob(path, detail=True)
            return matching
        facts = system.info(path)
        return {path: facts} if facts["type"] == "file" else system.find(path, detail=True)

    found = {name: facts for name, facts in sorted(_reading(listed, url).items()) if facts["type"] == "file"}
    if not found:
        raise DataError(f"{shown(url)}: no file there", "correct the URL")
    root = path if len(found) > 1 and "*" not in path else path.rpartition("/")[0]
    signed = urlsplit(url).query and len(found) == 1
    files = []
    for name, facts in found.items():
        if not isinstance(facts.get("size"), int):
            raise DataError(f"{shown(url)}: the server does not say how large {name} is", "download it, give a path")
        relative = name.removeprefix(root).lstrip("/").partition("?")[0]
        files.append(DataFile(url if signed else system.unstrip_protocol(name), facts["size"], relative))
    return files


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
