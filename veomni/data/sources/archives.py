"""WebDataset archives: tar files whose members of one name are one record. Members are read in memory."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from veomni.data.sources.files import decode
from veomni.data.sources.records import MEDIA_KEYS, Document
from veomni.errors import DataError

KEY = "__key__"
"""Field of a record that holds what its members' names have in common."""

_KINDS = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"), "image"),
    **dict.fromkeys(("mp4", "webm", "mkv", "mov", "avi"), "video"),
    **dict.fromkeys(("wav", "flac", "mp3", "ogg", "m4a", "opus"), "audio"),
}


@dataclass
class _Group:
    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)  # extension: first byte, size


class TarFile:
    """An uncompressed tar archive as WebDataset lays them out, indexed once.

    Neighbouring members whose paths agree up to the first dot of their name are one record. A ``json`` member gives the
    record's fields, ``txt`` its text, media the lists ``images``, ``videos`` and ``audios`` in the order of their
    members; any other member is bytes under its extension, and never unpickled.

    Args:
        path: The archive.
        text_key: The field that a ``txt`` member is put in.
        name: What messages call it; None for its path.

    Raises:
        DataError: it is no tar archive, is cut short, or a member is no plain file inside it.
    """

    def __init__(self, path: Path, text_key: str, name: str | None = None) -> None:
        self.files, self.text_key, self.name = (path,), text_key, name or str(path)
        self._file = path.open("rb")
        self._size = os.fstat(self._file.fileno()).st_size
        self._groups: list[_Group] = []
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as archive:
                for member in archive:
                    self._index(member)
        except tarfile.TarError as error:
            raise DataError(
                f"{self.name}: no tar archive: {error}", "the file is damaged or of another kind"
            ) from error

    def _index(self, member: tarfile.TarInfo) -> None:
        where = f"{self.name}, member {member.name!r}"
        parts = PurePosixPath(member.name).parts
        if member.name.startswith("/") or "\\" in member.name or ".." in parts:
            raise DataError(f"{where}: its path leads out of the archive", "make the archive again with plain names")
        if member.isdir():
            return
        if not member.isreg() or member.issparse():
            raise DataError(f"{where}: not a plain file", "leave links and devices out of the archive")
        if member.offset_data + member.size > self._size:
            raise DataError(f"{where}: the archive is cut short", "copy it again")
        if parts[-1].startswith("."):
            return
        stem, _, extension = parts[-1].partition(".")
        key = "/".join((*parts[:-1], stem))
        if not self._groups or self._groups[-1].key != key:
            self._groups.append(_Group(key))
        members = self._groups[-1].members
        if extension.lower() in members:
            raise DataError(f"{where}: the record has two members of this extension", "give each another one")
        members[extension.lower()] = (member.offset_data, member.size)

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Document:
        group = self._groups[index]
        where = f"{self.name}, record {group.key!r}"
        fields: dict[str, Any] = {}
        media: dict[str, list[bytes]] = {}
        for extension, (start, size) in group.members.items():
            content = os.pread(self._file.fileno(), size, start)
            if len(content) < size:
                raise DataError(f"{where}: the archive is cut short", "copy it again")
            kind = extension.rpartition(".")[2]
            if kind in _KINDS:
                media.setdefault(MEDIA_KEYS[_KINDS[kind]], []).append(content)
            elif kind == "json":
                fields |= _parsed(content, f"{where}, member .{extension}")
            elif kind == "txt":
                fields[self.text_key] = decode(content, f"{where}, member .{extension}")
            else:
                fields[extension] = content
        return Document({**fields, **media, KEY: group.key}, where)


def _parsed(content: bytes, where: str) -> Mapping[str, Any]:
    try:
        fields = json.loads(decode(content, where))
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} (line {error.lineno})", "fix it") from error
    if not isinstance(fields, Mapping):
        raise DataError(f"{where}: a {type(fields).__name__}, not an object", "write one JSON object")
    return fields
