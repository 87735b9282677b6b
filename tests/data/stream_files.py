"""Records written to disk in every form that is read."""

from __future__ import annotations

import gzip
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.conftest import sentence


def records(count, tag=""):
    return [{"text": f"{tag}{sentence(number)}"} for number in range(count)]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_jsonl(folder, rows):
    return jsonl(folder / "data.jsonl", rows)


def write_gzip(folder, rows):
    path = folder / "data.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def write_json(folder, rows):
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def write_parquet(folder, rows):
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet", row_group_size=7)
    return folder / "data.parquet"


def write_arrow(folder, rows):
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(folder / "data.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    return folder / "data.arrow"


def write_tar(folder, rows):
    """Every other record as text, the others as JSON, each with a file that is neither."""
    with tarfile.open(folder / "data.tar", "w") as archive:
        for number, row in enumerate(rows):
            if number % 2:
                add(archive, f"set/{number:04}.json", json.dumps(row).encode())
            else:
                add(archive, f"set/{number:04}.txt", row["text"].encode())
            add(archive, f"set/{number:04}.cls", b"%d" % number)
    return folder / "data.tar"


def add(archive, name, content, **facts):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in facts.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


def write_saved(folder, rows):
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(str(folder / "saved"), num_shards=2)
    return folder / "saved"


def write_folder(folder, rows):
    (folder / "parts").mkdir()
    for part in range(3):
        jsonl(folder / "parts" / f"{part}.jsonl", rows[part::3])
    (folder / "parts" / "README.md").write_text("not data")
    return folder / "parts"


KINDS = {
    "jsonl": write_jsonl, "gzip": write_gzip, "json": write_json, "parquet": write_parquet, "arrow": write_arrow,
    "tar": write_tar, "saved": write_saved, "folder": write_folder,
}  # fmt: skip
