"""Which rank is to blame, and what the run exits with."""

from __future__ import annotations

import signal

import pytest

from veomni.launch.rank_end import Failure, RankEnd, judge


def end(rank: int, status: int, *, stopped: bool = False, seen: float = 10.0, said: Failure | None = None) -> RankEnd:
    return RankEnd(rank, 100 + rank, status, stopped, seen, said)


def fault(time: float, message: str = "boom", code: int = 70) -> Failure:
    return Failure(
        "RuntimeError" if code == 70 else "ConfigError", message, code, time, "Traceback\n" if code == 70 else ""
    )


@pytest.mark.parametrize(
    ("statuses", "code"), [((0, 0), 0), ((75, 75), 75), ((0, 75), 70), ((0, 3), 70), ((78, 78), 78), ((-9, 0), 70)]
)
def test_exit_codes(statuses: tuple[int, ...], code: int) -> None:
    verdict = judge([end(rank, status) for rank, status in enumerate(statuses)])
    assert verdict.exit_code == code
    assert bool(verdict.report) == (code not in (0, 75))


def test_the_first_error_is_to_blame_even_if_its_rank_ended_last() -> None:
    ends = [end(0, 70, seen=1.0, said=fault(5.2, "peer closed")), end(1, 70, seen=2.0, said=fault(5.1, "the cause"))]
    report = judge(ends).report
    assert report.startswith("Traceback\nrun failed: rank 1 (pid 101): RuntimeError: the cause")
    assert report.endswith("\n  rank 0 (pid 100): RuntimeError: peer closed")


def test_a_killed_rank_goes_before_the_errors_it_caused() -> None:
    ends = [end(0, 70, said=fault(5.0, "peer closed")), end(1, -signal.SIGKILL, seen=6.0)]
    assert "run failed: rank 1 (pid 101) was killed by SIGKILL" in judge(ends).report


def test_an_abort_is_no_cause_where_there_is_an_error() -> None:
    ends = [end(0, -signal.SIGABRT, seen=6.0), end(1, 70, said=fault(5.0, "the cause"))]
    assert "run failed: rank 1" in judge(ends).report


def test_ranks_that_were_stopped_are_no_cause() -> None:
    ends = [
        end(0, -signal.SIGKILL, stopped=True, seen=1.0),
        end(1, 70, said=fault(5.0)),
        end(2, -signal.SIGTERM, stopped=True),
    ]
    report = judge(ends).report
    assert "run failed: rank 1" in report
    assert "rank 0 (pid 100) was stopped\n" in report


def test_a_rank_killed_on_its_way_out_still_means_what_it_said() -> None:
    saved = Failure("SystemExit", "75", 75, 1.0)
    assert judge([end(0, 75, said=saved), end(1, -signal.SIGTERM, said=saved)]).exit_code == 75


def test_bad_input_is_all_that_is_said_unless_a_fault_came_first() -> None:
    bad = fault(5.0, "key is 3\n  fix: make it 4", 78)
    assert judge([end(0, 78, said=bad), end(1, 78, said=bad)]).report == "error: key is 3\n  fix: make it 4"
    assert judge([end(0, 78, said=bad), end(1, 70, said=fault(4.0))]).exit_code == 70
