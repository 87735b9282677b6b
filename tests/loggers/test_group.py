"""One failing logger, and ranks that do not log."""

from __future__ import annotations

import json
from functools import partial

import pytest

from tests.loggers.disk import files_at_most
from veomni.loggers import JsonlLogger, Logger, LoggerGroup, TensorBoardLogger
from veomni.testing.ranks import run_ranks


class Recorder(Logger):
    name = "recorder"

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.calls: list[object] = []

    def log(self, metrics, step) -> None:
        if step == self.fail_at:
            raise ConnectionError("no route to host")
        self.calls.append((step, dict(metrics)))

    def log_config(self, config) -> None:
        self.calls.append(dict(config))

    def finalize(self, status) -> None:
        self.calls.append(status)


def log(logger: Logger, step: int) -> None:
    logger.log({"loss": 1.0}, step)


def test_all_get_everything(tmp_path) -> None:
    first, second = Recorder(), Recorder()
    group = LoggerGroup([first, second, JsonlLogger(tmp_path)])
    group.each(lambda each: each.log_config({"a": 1}))
    group.each(lambda each: each.truncate_after(0))
    group.each(lambda each: each.log({"loss": 1.0}, 1))
    group.each(lambda each: each.finalize("finished"))
    assert first.calls == second.calls == [{"a": 1}, (1, {"loss": 1.0}), "finished"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 1.0


def test_a_failing_logger_is_named_once_and_switched_off(tmp_path, caplog) -> None:
    failing, healthy = Recorder(fail_at=2), Recorder()
    group = LoggerGroup([failing, healthy, JsonlLogger(tmp_path)])
    for step in range(1, 5):
        group.each(partial(log, step=step))
    group.each(lambda each: each.finalize("finished"))
    assert failing.calls == [(1, {"loss": 1.0})]
    assert len(healthy.calls) == 5
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "the recorder logger failed and is switched off, training continues: ConnectionError: no route to host"
    ]


def test_a_real_backend_on_a_path_it_cannot_write_to(tmp_path, caplog) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    group = LoggerGroup([TensorBoardLogger(tmp_path), JsonlLogger(tmp_path)])
    group.each(lambda each: each.log({"loss": 1.0}, 1))
    group.each(lambda each: each.log({"loss": 1.0}, 2))
    assert "the tensorboard logger failed" in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_metrics_jsonl_failing_stops_the_run(tmp_path) -> None:
    group = LoggerGroup([JsonlLogger(tmp_path)])
    with files_at_most(10), pytest.raises(OSError, match="File too large"):
        group.each(lambda each: each.log({"loss": 1.0}, 1))


def log_on_every_rank(folder) -> int:
    group = LoggerGroup([JsonlLogger(folder), recorder := Recorder()])
    group.each(lambda each: each.truncate_after(0))
    group.each(lambda each: each.log({"loss": 1.0}, 1))
    group.each(lambda each: each.finalize("finished"))
    return len(recorder.calls)


def test_only_rank_0_logs(tmp_path) -> None:
    assert run_ranks(log_on_every_rank, 2, tmp_path, init=False) == [2, 0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
