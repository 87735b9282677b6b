"""A real offline run of Weights & Biases, read back from its file."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from veomni.errors import ConfigError, MissingExtraError
from veomni.loggers import WandbLogger

PROGRAM = """
import sys
from veomni.loggers import WandbLogger
logger = WandbLogger(sys.argv[1], project="a project", mode="offline")
logger.log_config({"model": {"hf_token": "CONFIGSECRET", "layers": 3}, "data": {"path": "https://me:URLSECRET@host/x"}})
for step in (1, 2, 3):
    logger.log({"loss": 1 / step, "mfu_full": None, "tokens": 100 * step}, step)
print("PRINTEDTEXT")
logger.finalize("finished")
"""
KEY = "0123456789abcdef" * 2 + "01234567"


def records(path: Path) -> list:
    """The records of a ``.wandb`` file: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, found, partial, position = path.read_bytes(), [], b"", 7
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _checksum, size, kind = struct.unpack("<IHB", data[position : position + 7])
        partial += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or the end of one
            found.append(wandb_internal_pb2.Record.FromString(partial))
            partial = b""
    return found


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("wandb_run") / "out"
    environment = {**os.environ, "WANDB_API_KEY": KEY, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(output), "--api_key=ARGUMENTSECRET"],
        env=environment,
        check=True,
        timeout=120,
    )
    (folder,) = (output / "wandb").glob("offline-run-*")
    return folder


def test_the_offline_file_holds_the_metrics_of_every_step(run_folder) -> None:
    (path,) = run_folder.glob("*.wandb")
    history = []
    for record in records(path):
        if record.HasField("history"):
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history.append((row.pop("_step"), {key: row[key] for key in row if not key.startswith("_")}))
    assert history == [(step, {"loss": 1 / step, "tokens": 100 * step}) for step in (1, 2, 3)]


def test_the_configuration_is_there_without_its_secrets(run_folder) -> None:
    (path,) = run_folder.glob("*.wandb")
    config: dict = {}
    for record in records(path):
        for update in [*record.run.config.update, *record.config.update]:
            config[update.key] = json.loads(update.value_json)
        if record.HasField("run"):
            assert record.run.project == "a project"
    assert config["model"] == {"hf_token": "***", "layers": 3}
    assert config["data"] == {"path": "https://***@host/x"}


def test_no_file_holds_a_secret_the_command_line_or_the_console(run_folder) -> None:
    files = [path for path in run_folder.parent.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        for text in ("CONFIGSECRET", "URLSECRET", "ARGUMENTSECRET", "PRINTEDTEXT", KEY):
            assert text.encode() not in content, path


def test_online_needs_a_key_in_the_environment(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
        WandbLogger(tmp_path, project="p", mode="online")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_names_the_extra(tmp_path, without) -> None:
    without("wandb")
    with pytest.raises(MissingExtraError, match=r"veomni\[dev\]"):
        WandbLogger(tmp_path, project="p", mode="offline")


def test_the_reader_of_this_test_sees_every_byte(run_folder) -> None:
    """The checksums of the file's first record hold, so the layout assumed above is the real one."""
    (path,) = run_folder.glob("*.wandb")
    data = path.read_bytes()
    checksum, size, kind = struct.unpack("<IHB", data[7:14])
    assert checksum == zlib.crc32(data[13 : 14 + size])
    assert kind == 1
