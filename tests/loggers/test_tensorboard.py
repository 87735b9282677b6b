"""Event files read back by TensorBoard itself."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from veomni.errors import MissingExtraError
from veomni.loggers import TensorBoardLogger


def read(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def scalars(folder, key: str) -> dict[int, float]:
    return {event.step: event.value for event in read(folder).Scalars(key)}


def test_scalars_and_configuration(tmp_path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_config({"model": {"api_key": "SECRET", "layers": 3}})
    for step in (1, 2, 3):
        logger.log({"loss": 1 / 2**step, "tokens": step, "mfu_full": None}, step)
    logger.finalize("finished")
    assert scalars(tmp_path, "loss") == {1: 0.5, 2: 0.25, 3: 0.125}
    assert scalars(tmp_path, "tokens") == {1: 1.0, 2: 2.0, 3: 3.0}
    events = read(tmp_path)
    assert events.Tags()["scalars"] == ["loss", "tokens"]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"layers": 3' in text
    assert '"api_key": "***"' in text


def test_a_resumed_run_hides_the_steps_it_takes_again(tmp_path) -> None:
    before = TensorBoardLogger(tmp_path)
    for step in range(1, 6):
        before.log({"loss": 1.0}, step)
    before.finalize("failed")
    resumed = TensorBoardLogger(tmp_path)
    resumed.truncate_after(3)
    resumed.log({"loss": 2.0}, 4)
    resumed.finalize("finished")
    assert scalars(tmp_path, "loss") == {1: 1.0, 2: 1.0, 3: 1.0, 4: 2.0}


def test_nothing_is_written_before_the_first_use(tmp_path) -> None:
    TensorBoardLogger(tmp_path).finalize("finished")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_names_the_extra(tmp_path, without) -> None:
    without("tensorboard")
    with pytest.raises(MissingExtraError, match=r"veomni\[dev\]"):
        TensorBoardLogger(tmp_path)
