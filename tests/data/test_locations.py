"""URLs, archives and compressed files give the records that files on this machine do."""

from __future__ import annotations

import json
import tarfile
import tempfile
from pathlib import Path

import fsspec
import pytest

from tests.data.loaders import dataset_of
from tests.data.stream_files import KINDS, add, jsonl, records, write_tar
from veomni.data import DataSource, RecordSchema, build_mixture
from veomni.data.sources.archives import tar_archive
from veomni.data.sources.files import json_ranges
from veomni.data.sources.locations import local_file, remote_files, shown

ROWS = records(23)


def put(folder, name):
    """Copy a file or directory to fsspec's store in memory, and return its URL."""
    memory = fsspec.filesystem("memory")
    memory.rm("/", recursive=True)
    source = folder / name
    files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
    for path in files:
        memory.pipe(f"/bucket/{path.relative_to(folder)}", path.read_bytes())
    return f"memory://bucket/{name}"


def texts(dataset):
    return sorted(document.record["text"] for document in dataset)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_url_is_read_as_the_file_is(kind, streaming, tmp_path):
    path = KINDS[kind](tmp_path, ROWS)
    before = set(Path(tempfile.gettempdir()).glob("veomni-*"))
    dataset = dataset_of(put(tmp_path, path.name), streaming=streaming, cache_dir=tmp_path / "cache")
    assert texts(dataset) == sorted(row["text"] for row in ROWS)
    assert next(iter(dataset)).where.startswith("memory:///bucket/")
    assert set(Path(tempfile.gettempdir()).glob("veomni-*")) == before, "no copy is left behind"
    assert (tmp_path / "cache").exists() != streaming, "only what is indexed is kept"


def test_patterns_and_directories_of_urls(tmp_path):
    for number in range(3):
        jsonl(tmp_path / f"{number}.jsonl", ROWS[number::3])
    (tmp_path / "notes.md").write_text("not data")
    put(tmp_path.parent, tmp_path.name)
    base = f"memory://bucket/{tmp_path.name}"
    assert [file.relative for file in remote_files(f"{base}/*.jsonl")] == ["0.jsonl", "1.jsonl", "2.jsonl"]
    assert texts(dataset_of(f"{base}/*.jsonl", streaming=True)) == texts(dataset_of(base, streaming=True))


def test_a_file_url_is_a_path(tmp_path):
    path = jsonl(tmp_path / "t.jsonl", ROWS)
    assert texts(dataset_of(f"file://{path}")) == texts(dataset_of(str(path)))


def test_plain_text_from_urls_and_compressed(tmp_path):
    import gzip

    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt.gz").write_bytes(gzip.compress(b"first"))
    (tmp_path / "texts" / "b.txt").write_text("second")
    for path in (str(tmp_path / "texts"), put(tmp_path, "texts")):
        for streaming in (False, True):
            dataset = dataset_of(path, streaming=streaming, cache_dir=tmp_path / "cache")
            assert texts(dataset) == ["first", "second"]


def test_what_may_be_secret_is_not_shown():
    assert shown("https://user:key@host.org/a/b.jsonl?X-Amz-Signature=0") == "https://host.org/a/b.jsonl"
    assert shown("/data/a?b.jsonl") == "/data/a?b.jsonl"


def test_ranges_hold_every_line_once_wherever_they_are_cut(tmp_path, monkeypatch):
    path = tmp_path / "t.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\n\n'
        + b"".join(b'{"text": "%s"}\n' % (b"x" * n) for n in range(40))
        + b'{"text": "end"}'
    )
    expected = [document.record["text"] for document in dataset_of(str(path))]
    for size in (1, 2, 3, 15, 16, 17, 100, 10_000):
        monkeypatch.setattr("veomni.data.sources.files.RANGE_BYTES", size)
        ranges = json_ranges(local_file(path), RecordSchema())
        parts = [ranges.open(block) for block in range(ranges.count)]
        assert [part[index].record["text"] for part in parts for index in range(len(part))] == expected, size


def test_members_of_one_name_are_a_record(tmp_path):
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as archive:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        add(archive, "a/1.json", json.dumps({"messages": [1], "images": ["elsewhere"]}).encode())
        add(archive, "a/1.0.jpg", b"left")
        add(archive, "a/1.1.jpg", b"right")
        add(archive, "a/1.wav", b"sound")
        add(archive, "a/1.pkl", b"cos\nsystem\n(S'touch canary'\ntR.")
        add(archive, "b/1.txt", b"another directory, another record")
        add(archive, "b/.hidden", b"")
    source = tar_archive(local_file(path), RecordSchema())
    assert len(source) == 2
    assert source[0].record == {
        "__key__": "a/1", "messages": [1], "images": [b"left", b"right"], "audios": [b"sound"],
        "pkl": b"cos\nsystem\n(S'touch canary'\ntR.",
    }  # fmt: skip
    assert source[1].record["text"] == "another directory, another record"
    assert not list(tmp_path.glob("canary"))
    assert {file.name for file in tmp_path.iterdir()} == {"t.tar"}, "nothing is extracted"


def test_a_mixture_may_lie_in_several_places(tmp_path):
    write_tar(tmp_path, ROWS[:10])
    jsonl(tmp_path / "t.jsonl", ROWS[10:])
    sources = [DataSource([str(tmp_path / "t.jsonl"), put(tmp_path, "data.tar")], "both")]
    dataset = build_mixture(sources, streaming=True)
    assert texts(dataset) == sorted(row["text"] for row in ROWS)
