"""``metrics.jsonl`` on disk."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import signal
import time

import pytest

from tests.loggers.disk import files_at_most
from veomni.loggers import JsonlLogger

KEYS = ["step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "step_seconds", "mfu_causal", "mfu_full",
        "peak_memory_gib"]  # fmt: skip


def read(logger: JsonlLogger) -> list[dict]:
    text = logger.path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def steps(logger: JsonlLogger) -> list[int]:
    return [row["step"] for row in read(logger)]


def filled(folder, last: int) -> JsonlLogger:
    logger = JsonlLogger(folder)
    for step in range(1, last + 1):
        logger.log({"loss": 1 / step}, step)
    return logger


def test_every_line_has_the_keys_and_extra_ones_follow(tmp_path) -> None:
    logger = JsonlLogger(tmp_path / "made" / "on the way")
    logger.log({"eval_loss": 0.5, "loss": 1.5, "tokens": 8000}, 7)
    (row,) = read(logger)
    assert list(row) == [*KEYS, "eval_loss"]
    assert row == {**dict.fromkeys(KEYS), "step": 7, "loss": 1.5, "tokens": 8000, "eval_loss": 0.5}
    assert isinstance(row["tokens"], int)


def test_floats_keep_every_bit(tmp_path) -> None:
    logger = JsonlLogger(tmp_path)
    draw = random.Random(0)
    values = [draw.random() * 10.0 ** draw.randint(-300, 300) for _ in range(200)]
    for step, value in enumerate(values, start=1):
        logger.log({"loss": value}, step)
    assert [row["loss"] for row in read(logger)] == values


def test_numbers_that_are_not_finite_are_null_with_one_warning(tmp_path, caplog) -> None:
    logger = JsonlLogger(tmp_path)
    for step, value in enumerate([math.nan, math.inf, -math.inf], start=1):
        logger.log({"test_jsonl_value": value}, step)
    assert [row["test_jsonl_value"] for row in read(logger)] == [None] * 3
    assert len([record for record in caplog.records if "test_jsonl_value" in record.getMessage()]) == 1


def test_nothing_is_written_before_the_first_line(tmp_path) -> None:
    JsonlLogger(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_lines_survive_a_kill(tmp_path) -> None:
    child = os.fork()
    if child == 0:
        try:
            filled(tmp_path, 5)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    assert steps(JsonlLogger(tmp_path)) == [1, 2, 3, 4, 5]


def test_resuming_drops_later_lines_and_appends(tmp_path) -> None:
    before = filled(tmp_path, 10)
    kept = before.path.read_text().splitlines()[:6]
    before.finalize("failed")
    resumed = JsonlLogger(tmp_path)
    resumed.truncate_after(6)
    assert resumed.path.read_text().splitlines() == kept
    resumed.log({"loss": 99.0}, 7)
    assert steps(resumed) == [1, 2, 3, 4, 5, 6, 7]
    assert read(resumed)[-1]["loss"] == 99.0
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resuming_from_the_start_or_from_nothing(tmp_path) -> None:
    JsonlLogger(tmp_path).truncate_after(5)
    assert list(tmp_path.iterdir()) == []
    logger = filled(tmp_path, 3)
    logger.truncate_after(0)
    assert logger.path.read_bytes() == b""
    logger.log({}, 1)
    assert steps(logger) == [1]


@pytest.mark.parametrize("torn", ['{"step": 4, "loss": 0.', '{"step": 4}', "\x00\x00"])
@pytest.mark.parametrize("truncate", [True, False])
def test_a_torn_last_line_is_not_continued(tmp_path, torn, truncate) -> None:
    before = filled(tmp_path, 3)
    before.finalize("failed")
    with before.path.open("a") as file:
        file.write(torn)
    resumed = JsonlLogger(tmp_path)
    if truncate:
        resumed.truncate_after(3)
    resumed.log({"loss": 0.25}, 4)
    assert steps(resumed) == [1, 2, 3, 4]


def test_lines_of_no_step_are_dropped_with_a_word(tmp_path, caplog) -> None:
    logger = filled(tmp_path, 2)
    logger.finalize("failed")
    with logger.path.open("a") as file:
        file.write('\x00\x00\n[1]\n{"loss": 1}\n{"step": 3}\n')
    with caplog.at_level(logging.WARNING):
        logger.truncate_after(2)
    assert steps(logger) == [1, 2]
    assert len([record for record in caplog.records if "not one of a step" in record.getMessage()]) == 3


def test_truncating_is_all_or_nothing(tmp_path) -> None:
    """A reader beside it never sees anything but the old lines or the new ones."""
    logger = filled(tmp_path, 20_000)
    logger.finalize("failed")
    whole = logger.path.stat().st_size
    child = os.fork()
    if child == 0:
        try:
            logger.truncate_after(1)
        finally:
            os._exit(0)
    sizes = set()
    deadline = time.monotonic() + 30
    while os.waitpid(child, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
        sizes.add(logger.path.stat().st_size)
    assert sizes <= {whole, logger.path.stat().st_size}
    assert steps(logger) == [1]


def test_a_full_disk_is_not_hidden(tmp_path) -> None:
    logger = filled(tmp_path, 3)
    with files_at_most(logger.path.stat().st_size + 10), pytest.raises(OSError, match="File too large"):
        logger.log({"loss": 1.0}, 4)
