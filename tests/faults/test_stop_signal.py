"""Signals become a flag, a second one is obeyed at once, and the old handlers come back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest

from tests.launch.conftest import Program
from veomni.launch import StopSignal

Start = Callable[..., Program]
WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.mark.parametrize("number", WATCHED)
def test_a_signal_sets_the_flag_and_nothing_else(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with StopSignal() as stop:
            assert (stop.requested, stop.signal_name) == (False, None)
            os.kill(os.getpid(), number)
            assert (stop.requested, stop.signal_name) == (True, number.name)
            os.kill(os.getpid(), number)  # the echo of a scheduler that signals every process of a job
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_old_handlers_come_back() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        stop = StopSignal()
        stop.close()
        stop.close()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == [signal.SIGUSR1]
        assert not stop.requested
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_cannot_watch() -> None:
    raised: list[Exception] = []

    def watch() -> None:
        try:
            StopSignal()
        except ValueError as error:
            raised.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert len(raised) == 1


STUBBORN = """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stop = StopSignal()
    {before}
    note("pid0", os.getpid())
    while not stop.requested:
        time.sleep(0.01)
    time.sleep(0.6)  # longer than an echo takes
    note("first", stop.signal_name)
    time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_one_ends_the_process(start: Start, number: signal.Signals) -> None:
    program = start(STUBBORN.format(before=""))
    program.pids(1)
    program.send(number)
    assert program.note("first") == number.name
    program.send(number)
    assert program.wait() == -number


def test_a_forked_worker_obeys_sigterm(start: Start) -> None:
    program = start(
        """
        stop = StopSignal()
        ready, done = os.pipe()
        worker = os.fork()
        if worker == 0:
            os.write(done, b"x")
            time.sleep(1000)
        os.read(ready, 1)
        os.kill(worker, signal.SIGTERM)
        note("worker", os.waitpid(worker, 0)[1])
        note("flag", stop.requested)
        """
    )
    assert program.wait() == 0, program.output
    assert int(program.note("worker")) == signal.SIGTERM
    assert program.note("flag") == "False"
