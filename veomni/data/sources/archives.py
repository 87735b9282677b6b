"""WebDataset archives: tar files whose members of one name are one record. Members are read in memory."""

import os
import tarfile
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from veomni.data.sources.blocks import Records
from veomni.data.sources.files import decode, json_object
from veomni.data.sources.locations import DataFile
from veomni.data.sources.records import MEDIA_KEYS, Document
from veomni.data.sources.schema import RecordSchema
from veomni.errors import DataError

KEY = "__key__"
"""Field of a record that holds what its members' names have in common."""

_KINDS = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"), "image"),
    **dict.fromkeys(("mp4", "webm", "mkv", "mov", "avi"), "video"),
    **dict.fromkeys(("wav", "flac", "mp3", "ogg", "m4a", "opus"), "audio"),
}

_Members = dict[str, tuple[int, int]]  # extension: first byte, size


def tar_archive(file: DataFile, schema: RecordSchema) -> Records:
    """Return an uncompressed tar archive on this machine as WebDataset lays them out, indexed once.

    Neighbouring members whose paths agree up to the first dot of their name are one record. A ``json`` member gives the
    record's fields, ``txt`` its text, media the lists ``images``, ``videos`` and ``audios`` in the order of their
    members; any other member is bytes under its extension, and never unpickled. DataError where it is no tar archive,
    cut short, or a member is no plain file inside it.
    """
    opened = file.open()
    groups: list[tuple[str, _Members]] = []
    try:
        with tarfile.open(fileobj=opened, mode="r:") as archive:
            for member in archive:
                _index(member, groups, file)
    except tarfile.TarError as error:
        raise DataError(f"{file}: no tar archive: {error}", "the file is damaged or of another kind") from error

    def read(index: int) -> Document:
        key, members = groups[index]
        where = f"{file}, record {key!r}"
        contents = {name: os.pread(opened.fileno(), size, start) for name, (start, size) in members.items()}
        if any(len(contents[name]) < size for name, (_, size) in members.items()):
            raise DataError(f"{where}: the archive is cut short", "copy it again")
        return Document({**_record(contents, where, schema.text_key), KEY: key}, where)

    return Records(len(groups), read)


def _index(member: tarfile.TarInfo, groups: list[tuple[str, _Members]], file: DataFile) -> None:
    where, parts = f"{file}, member {member.name!r}", PurePosixPath(member.name).parts
    if member.name.startswith("/") or "\\" in member.name or ".." in parts:
        raise DataError(f"{where}: its path leads out of the archive", "make the archive again with plain names")
    if member.isdir():
        return
    if not member.isreg() or member.issparse():
        raise DataError(f"{where}: not a plain file", "leave links and devices out of the archive")
    if member.offset_data + member.size > file.size:
        raise DataError(f"{where}: the archive is cut short", "copy it again")
    if parts[-1].startswith("."):
        return
    stem, _, extension = parts[-1].partition(".")
    key, extension = "/".join((*parts[:-1], stem)), extension.lower()
    if not groups or groups[-1][0] != key:
        groups.append((key, {}))
    members = groups[-1][1]
    if extension in members:
        raise DataError(f"{where}: the record has two members of this extension", "give each another one")
    members[extension] = (member.offset_data, member.size)


def _record(contents: Mapping[str, bytes], where: str, text_key: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    media: dict[str, list[bytes]] = {}
    for extension, content in contents.items():
        kind = extension.rpartition(".")[2]
        if kind in _KINDS:
            media.setdefault(MEDIA_KEYS[_KINDS[kind]], []).append(content)
        elif kind == "json":
            fields |= json_object(content, f"{where}, member .{extension}")
        elif kind == "txt":
            fields[text_key] = decode(content, f"{where}, member .{extension}")
        else:
            fields[extension] = content
    return {**fields, **media}
