from __future__ import annotations

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.loaders import dataset_of
from veomni.data import PYTHON_STDLIB, build_dataset
from veomni.data.sources.corpora import python_stdlib_files
from veomni.errors import DataError

RECORDS = [{"id": n, "text": f"document {n} ☃" * (n % 4 + 1)} for n in range(25)]
TEXTS = [record["text"] for record in RECORDS]


def write_jsonl(path):
    lines = [json.dumps(record) for record in RECORDS]
    path.write_text("\ufeff" + "\n\n".join(lines[:9]) + "\r\n  \n" + "\n".join(lines[9:]), encoding="utf-8")


def write_json(path):
    path.write_text(json.dumps(RECORDS, indent=1))


def write_parquet(path):
    pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=7)


def write_arrow(path):
    table = pa.Table.from_pylist(RECORDS)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def write_arrow_stream(path):
    table = pa.Table.from_pylist(RECORDS)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def write_saved(path):
    from datasets import Dataset

    Dataset.from_list(RECORDS).save_to_disk(str(path))


WRITERS = {
    "t.jsonl": write_jsonl,
    "t.json": write_json,
    "t.parquet": write_parquet,
    "t.arrow": write_arrow,
    "t.feather": write_arrow_stream,
    "saved": write_saved,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents_in_any_order(name, tmp_path):
    WRITERS[name](tmp_path / name)
    dataset, held_out = build_dataset(str(tmp_path / name))
    assert held_out is None
    assert list(dataset.texts()) == TEXTS
    assert [dataset[n].record["text"] for n in (24, 3, 20, 0)] == [TEXTS[n] for n in (24, 3, 20, 0)]


def test_paths_are_read_one_after_the_other(tmp_path):
    write_parquet(tmp_path / "a.parquet")
    write_jsonl(tmp_path / "b.jsonl")
    for paths in ([str(tmp_path / "a.parquet"), str(tmp_path / "b.jsonl")], str(tmp_path)):
        dataset = dataset_of(paths)
        assert list(dataset.texts()) == TEXTS * 2


def test_jsonl_names_the_line_though_blank_ones_are_skipped(tmp_path):
    write_jsonl(tmp_path / "t.jsonl")
    dataset = dataset_of(str(tmp_path / "t.jsonl"))
    lines = (tmp_path / "t.jsonl").read_text(encoding="utf-8-sig").split("\n")
    for document in dataset:
        assert json.loads(lines[int(document.where.rsplit(" ", 1)[1]) - 1]) == document.record


def test_directories_of_text_are_sorted_and_hidden_files_left_out(tmp_path):
    for name, text in {"b/1.txt": "two", "a.py": "one\r\n", "package.json": "{}", ".git/x": "no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    dataset = dataset_of(str(tmp_path))
    assert list(dataset.texts()) == ["one\r\n", "two", "{}"]


def test_data_files_win_over_what_lies_beside_them(tmp_path, caplog):
    write_parquet(tmp_path / "t.parquet")
    (tmp_path / "README.md").write_text("about")
    assert list(dataset_of(str(tmp_path)).texts()) == TEXTS
    assert "README.md" in caplog.text


def test_held_out_documents_are_apart_stable_and_follow_the_seed(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": str(n)}) + "\n" for n in range(2000)))
    train, held = build_dataset(str(path), eval_fraction=0.1, seed=1)
    held_texts = set(held.texts())
    assert held_texts.isdisjoint(train.texts())
    assert len(train) + len(held) == 2000
    assert 150 < len(held) < 250
    first = build_dataset(str(path), eval_fraction=0.1, seed=1, max_documents=1000)[1]
    assert set(first.texts()) == {text for text in held_texts if int(text) < 1000}, "appending moves nothing"
    assert set(build_dataset(str(path), eval_fraction=0.1, seed=2)[1].texts()) != held_texts


def test_the_standard_library_is_a_corpus():
    files = python_stdlib_files()
    names = {path.name for path in files}
    assert {"argparse.py", "dataclasses.py"} <= names
    assert not any({"site-packages", "test", "idlelib"} & set(path.parts) for path in files)
    dataset = dataset_of(PYTHON_STDLIB)
    assert len(dataset) == len(files)
    assert sum(map(len, dataset.texts())) > 5_000_000


def test_saved_datasets_are_read_without_the_library(tmp_path, monkeypatch):
    write_saved(tmp_path / "saved")
    (tmp_path / "saved" / "cache-1.arrow").write_bytes(b"made by a map of the library")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert list(dataset_of(str(tmp_path / "saved")).texts()) == TEXTS


def test_a_saved_dataset_of_splits_names_them(tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict(train=Dataset.from_list(RECORDS), test=Dataset.from_list(RECORDS)).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match=r"d/train, .*d/test"):
        build_dataset(str(tmp_path / "d"))
