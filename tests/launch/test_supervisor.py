"""Ranks started here live and die together: killed processes, exit codes and signals, seen from outside."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.conftest import Program, is_running, wait_until

Start = Callable[..., Program]

HANG = """
    @entrypoint
    def main():
        place = join_or_start(int(sys.argv[1]))
        if "ignore" in sys.argv and place.rank == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        note(f"pid{place.rank}", os.getpid())
        time.sleep(1000)

    main()
"""
STOP = """
    @entrypoint
    def main():
        place = join_or_start(2)
        with StopSignal() as stop:
            note(f"pid{place.rank}", os.getpid())
            while not stop.requested:
                time.sleep(0.01)
        if place.rank == 0 and "slow" in sys.argv:
            note("saving", 1)
            while "stuck" in sys.argv or not Path(os.environ["NOTES"], "go").exists():
                time.sleep(0.01)
        note(f"stopped{place.rank}", stop.signal_name)
        sys.exit(75)

    main()
"""
COLLECTIVE = """
    import torch, torch.distributed as dist

    @entrypoint
    def main():
        place = join_or_start(2)
        dist.init_process_group("gloo")
        dist.barrier()
        note(f"pid{place.rank}", os.getpid())
        if place.rank == 1:
            time.sleep(1000)
        dist.all_reduce(torch.zeros(1))

    main()
"""


def test_ranks_see_each_other_and_share_the_cores(start: Start) -> None:
    program = start(
        """
        import torch, torch.distributed as dist

        @entrypoint
        def main():
            place = join_or_start(2)
            dist.init_process_group("gloo")
            total = torch.tensor(place.rank + 1)
            dist.all_reduce(total)
            flags = sys.dont_write_bytecode
            note(f"seen{place.rank}", f"{place.kind} {place.world_size} {int(total)} {sys.argv[1:]} {flags}")

        main()
        """,
        "two words",
        "--x=1",
        command=[sys.executable, "-B"],
    )
    assert program.wait() == 0, program.output
    assert {program.note(f"seen{rank}") for rank in range(2)} == {"child 2 3 ['two words', '--x=1'] True"}


@pytest.mark.parametrize("ignores", [False, True], ids=["sleeping", "ignoring SIGTERM"])
def test_a_killed_rank_takes_the_others_with_it(start: Start, ignores: bool) -> None:
    program = start(HANG, "3", *["ignore"] * ignores)
    program.end_by_killing(rank=1, ranks=3, within=10 if ignores else 4)
    assert "rank 0" in program.output
    assert "rank 2" in program.output


def test_a_killed_rank_ends_a_collective(start: Start) -> None:
    start(COLLECTIVE).end_by_killing(rank=1)


def test_a_raising_rank_is_the_one_reported(start: Start) -> None:
    program = start(
        """
        @entrypoint
        def main():
            place = join_or_start(3)
            if place.rank == 2:
                raise ZeroDivisionError("in rank 2")
            time.sleep(1000)

        main()
        """
    )
    assert program.wait() == 70
    assert "run failed: rank 2" in program.output
    assert program.output.count("Traceback") == 1
    assert "ZeroDivisionError: in rank 2" in program.output


def test_an_exit_code_is_named(start: Start) -> None:
    program = start(
        "place = join_or_start(2)\n    sys.exit(3) if place.rank else time.sleep(1000)".replace("\n    ", "\n")
    )
    assert program.wait() == 70
    assert "exited with code 3" in program.output


def test_bad_input_on_all_ranks_is_said_once(start: Start) -> None:
    program = start(
        """
        @entrypoint
        def main():
            join_or_start(4)
            raise ConfigError("train.lr is 'fast'", "give a number")

        main()
        """
    )
    assert program.wait() == 78
    assert program.output.count("train.lr is 'fast'") == 1
    assert program.output.count("fix: give a number") == 1
    assert "Traceback" not in program.output
    assert "run failed" not in program.output


def test_a_killed_supervisor_leaves_no_rank(start: Start) -> None:
    program = start(HANG, "2", "ignore")
    pids = program.pids(2)
    program.send(signal.SIGKILL)
    assert wait_until(lambda: not any(is_running(pid) for pid in pids), 10) < 2


def test_a_supervisor_killed_while_its_ranks_still_import_leaves_none(start: Start) -> None:
    program = start(
        """
        note(f"pid{os.environ.get('RANK', 'supervisor')}", os.getpid())
        if "RANK" in os.environ:
            time.sleep(1000)  # before it has joined anything
        join_or_start(2)
        """
    )
    pids = program.pids(2)
    program.send(signal.SIGKILL)
    wait_until(lambda: not any(is_running(pid) for pid in pids), 10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_all_ranks_and_75_comes_back(start: Start, number: signal.Signals) -> None:
    program = start(STOP, "slow")
    program.pids(2)
    program.send(number)
    program.note("saving")
    assert program.note("stopped1") == number.name
    Path(program.notes / "go").touch()
    assert program.wait() == 75
    assert program.note("stopped0") == number.name
    assert "run failed" not in program.output


def test_a_request_for_a_profile_reaches_all_ranks_and_kills_none_that_starts_up(start: Start) -> None:
    program = start(
        """
        from veomni.launch.signals import ProfileSignal

        rank = os.environ.get("RANK")
        if rank is not None:
            note(f"early{rank}", os.getpid())
            while not (Path(os.environ["NOTES"]) / "go").exists():
                time.sleep(0.01)
        place = join_or_start(2)
        asked = ProfileSignal()
        note(f"pid{place.rank}", os.getpid())
        while not asked.requested:
            time.sleep(0.01)
        """
    )
    program.note("early0"), program.note("early1")
    program.send(signal.SIGUSR2)
    wait_until(lambda: "passing SIGUSR2 on" in program.output)
    Path(program.notes / "go").touch()
    program.pids(2)
    program.send(signal.SIGUSR2)
    assert program.wait() == 0, program.output


def test_a_second_sigterm_kills_at_once(start: Start) -> None:
    program = start(STOP, "slow", "stuck")
    pids = program.pids(2)
    program.send(signal.SIGTERM)
    program.note("saving")
    program.send(signal.SIGTERM)
    second = time.monotonic()
    assert program.wait() == 70
    assert time.monotonic() - second < 3
    assert not any(is_running(pid) for pid in pids)


def test_workers_of_a_killed_rank_die_too(start: Start) -> None:
    program = start(
        """
        place = join_or_start(2)
        worker = os.fork()
        if worker == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(1000)
        note(f"worker{place.rank}", worker)
        note(f"pid{place.rank}", os.getpid())
        time.sleep(1000)
        """
    )
    pids = program.pids(2)
    workers = [int(program.note(f"worker{rank}")) for rank in range(2)]
    os.kill(pids[0], signal.SIGKILL)
    assert program.wait() == 70
    wait_until(lambda: not any(is_running(pid) for pid in workers), 5)


def test_nothing_is_left_in_the_temporary_directory(start: Start, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    program = start("place = join_or_start(2)\nsys.exit(1)", TMPDIR=str(temporary))
    assert program.wait() == 70
    assert list(temporary.iterdir()) == []
