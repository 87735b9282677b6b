"""The progress bar as a terminal receives it, and the lines anything else receives."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import sys
import threading

import pytest

from veomni.logging import create_logger
from veomni.metrics import Progress

METRICS = {"loss": 2.34567, "tokens": 24691.2, "step_seconds": 2.0, "mfu_causal": None, "lr": 0.1}


def on_a_terminal(run, columns: int = 100) -> str:
    """What a pseudo-terminal of so many columns receives while ``run(stream)`` writes to it."""
    import fcntl
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    received = bytearray()

    def read() -> None:
        while True:
            try:
                received.extend(os.read(leader, 65536))
            except OSError:  # the other end is closed
                return

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(follower, "w") as stream:
        run(stream)
    reader.join(10)
    os.close(leader)
    return received.decode()


def screen(text: str) -> list[str]:
    """The lines a terminal shows in the end: carriage returns write over, cursor-up goes back."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[A|\r|\n|[^\r\n\x1b]+", text):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token == "\x1b[A":
            row -= 1
        else:
            lines[row] = lines[row][:column].ljust(column) + token + lines[row][column + len(token) :]
            column += len(token)
    return [line.rstrip() for line in lines]


def test_a_bar_on_a_terminal() -> None:
    def run(stream) -> None:
        progress = Progress(20, 10, stream=stream)
        for step in range(11, 21):
            progress.update(step, METRICS)
        progress.close()

    shown = screen(on_a_terminal(run))
    assert len(shown[0]) <= 100
    assert re.fullmatch(
        r"100%\|█+\| step 20/20, 00:\d\d elapsed, 00:00 left, loss 2\.3457, 12,346 tokens/s", shown[0]
    ), shown
    assert shown[1:] == [""]


def test_log_lines_go_above_the_bar_and_the_stream_is_given_back(monkeypatch) -> None:
    logger = create_logger("tests.progress")
    handler = logging.getLogger("veomni").handlers[0]
    before = handler.stream

    def run(stream) -> None:
        monkeypatch.setattr(handler, "stream", stream)
        progress = Progress(4, stream=stream)
        progress.update(1, METRICS)
        logger.info_rank0("saved a checkpoint")
        progress.update(2, METRICS)
        logger.warning_rank0("something is odd")
        progress.update(4, METRICS)
        progress.close()
        assert handler.stream is stream

    lines = screen(on_a_terminal(run))
    monkeypatch.undo()
    assert handler.stream is before
    assert re.fullmatch(r"\[\S+ I rank0 veomni\S+\] saved a checkpoint", lines[0]), lines
    assert re.fullmatch(r"\[\S+ W rank0 veomni\S+\] something is odd", lines[1]), lines
    assert lines[2].startswith("100%|")
    assert "step 4/4" in lines[2]
    assert lines[3:] == [""]


def lines_of(total: int | None, initial: int, last: int, **options) -> list[str]:
    stream = io.StringIO()
    progress = Progress(total, initial, stream=stream, **options)
    for step in range(initial + 1, last + 1):
        progress.update(step, METRICS)
    progress.close()
    return stream.getvalue().splitlines()


def test_lines_where_there_is_no_terminal() -> None:
    lines = lines_of(250, 30, 250)
    steps = [int(re.match(r"step (\d+)/250 \(", line).group(1)) for line in lines]
    assert steps == [31, 50, 75, 100, 125, 150, 175, 200, 225, 250]
    assert re.fullmatch(r"step 50/250 \(20%\), loss 2\.3457, 12,346 tokens/s, \d\d:\d\d left", lines[1]), lines[1]
    assert lines[-1] == "step 250/250 (100%), loss 2.3457, 12,346 tokens/s"


def test_the_speed_is_that_of_the_steps_since_the_last_line() -> None:
    stream = io.StringIO()
    progress = Progress(30, stream=stream)
    for step in range(1, 31):
        progress.update(step, {"loss": 1.0, "tokens": 100 * step, "step_seconds": 2.0, "mfu_causal": 0.5})
    speeds = [re.search(r"([\d.,]+) tokens/s, mfu 50\.0%", line).group(1) for line in stream.getvalue().splitlines()]
    latest = [(step - 2, step - 1, step) for step in range(3, 31, 3)]  # a line every three steps, and the first
    assert speeds == ["50", *(f"{sum(steps) * 100 / 6:,.0f}" for steps in latest)]


def test_evaluations_and_metrics_of_the_loop_are_shown() -> None:
    stream = io.StringIO()
    progress = Progress(20, stream=stream)
    for step in range(1, 6):
        measured = {"eval_loss": 1.25, "perplexity": 3.49, "eval_accuracy": 0.75} if step == 3 else {}
        progress.update(step, {"loss": 2.0, "accuracy": 0.5, "samples": 8, "step_seconds": 2.0, **measured})
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step 1/20 (5%), loss 2.0000, accuracy 0.5000, 4 samples/s")
    assert lines[2] == "step 3, evaluation: loss 1.2500, accuracy 0.7500"


def test_an_evaluation_goes_above_the_bar_and_the_last_step_closes_it() -> None:
    def run(stream) -> None:
        progress = Progress(4, stream=stream)
        progress.update(2, {**METRICS, "eval_loss": 1.25})
        progress.update(4, METRICS)
        stream.write("a sample\n")

    lines = screen(on_a_terminal(run))
    assert lines[0] == "step 2, evaluation: loss 1.2500"
    assert "step 4/4" in lines[1]
    assert lines[2] == "a sample"


def test_lines_of_a_run_without_known_end() -> None:
    assert [line.partition(",")[0] for line in lines_of(None, 0, 25)] == ["step 1", "step 10", "step 20"]


def test_short_runs_show_every_step() -> None:
    assert len(lines_of(3, 0, 3)) == 3


def test_other_ranks_show_nothing(monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert lines_of(3, 0, 3) == []


@pytest.mark.parametrize("seconds_per_step", [2])
def test_time_left_is_the_mean_step_times_the_steps_left(seconds_per_step, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("veomni.metrics.progress.time.perf_counter", lambda: now[0])
    stream = io.StringIO()
    progress = Progress(100, 40, stream=stream)
    for step in range(41, 51):
        now[0] += seconds_per_step
        progress.update(step, {"loss": 1.0})
    assert stream.getvalue().splitlines()[-1] == "step 50/100 (50%), loss 1.0000, 01:40 left"


def test_standard_error_is_the_default(capsys) -> None:
    Progress(1).update(1, {"loss": 1.0})
    assert "step 1/1" in capsys.readouterr().err
    assert sys.stderr is not None


def test_a_terminal_that_does_not_say_its_width_gets_a_bar_of_80_columns() -> None:
    def run(stream) -> None:
        progress = Progress(4, stream=stream)
        progress.update(4, METRICS)
        progress.close()

    shown = screen(on_a_terminal(run, columns=0))
    assert any("step 4/4" in line and 60 < len(line) <= 80 for line in shown)
