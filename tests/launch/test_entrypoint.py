"""Errors become exit codes and one message, whatever process they end."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.conftest import Program

Start = Callable[..., Program]

MAIN = """
    from veomni.errors import NonFiniteError

    @entrypoint
    def main():
        {body}

    if __name__ == "__main__":
        main()
"""


@pytest.mark.parametrize(
    ("body", "code", "said", "unsaid"),
    [
        ("return 3", 0, "", "Traceback"),
        ("raise ConfigError('key is 3', 'make it 4')", 78, "error: key is 3\n  fix: make it 4\n", "Traceback"),
        ("raise NonFiniteError('loss is nan')", 70, "NonFiniteError: loss is nan", "Error: key"),
        ("raise ZeroDivisionError('x')", 70, "Traceback", "fix:"),
        ("sys.exit()", 0, "", "Traceback"),
        ("sys.exit(75)", 75, "", "Traceback"),
        ("sys.exit('words')", 1, "words", "Traceback"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV, "Fatal Python error: Segmentation fault", "fix:"),
        ("signal.signal(2, signal.default_int_handler); os.kill(os.getpid(), 2)", -signal.SIGINT, "", "Traceback"),
    ],
)
def test_exit_codes(start: Start, body: str, code: int, said: str, unsaid: str) -> None:
    program = start(MAIN.format(body=body))
    assert program.wait() == code, program.output
    assert said in program.output
    assert unsaid not in program.output


def test_the_result_passes_and_the_process_group_is_left(start: Start) -> None:
    program = start(
        """
        import torch.distributed as dist

        @entrypoint
        def main():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            return "result"

        print(main(), dist.is_initialized())
        """
    )
    assert program.wait() == 0, program.output
    assert program.output.endswith("result False\n")


def test_all_ranks_leave_in_order_however_late_one_is(start: Start) -> None:
    program = start(
        """
        import atexit
        import torch, torch.distributed as dist

        @entrypoint
        def main():
            place = join_or_start(2)
            dist.init_process_group("gloo")
            dist.all_reduce(torch.zeros(1))
            late = Path(os.environ["NOTES"], "late")
            atexit.register(lambda: note(f"ended{place.rank}", f"after the late one: {late.exists()}"))
            if place.rank == 1:
                time.sleep(1.0)  # the other one would be gone by then
                note("late", 1)

        main()
        """
    )
    assert program.wait() == 0, program.output
    assert {program.note(f"ended{rank}") for rank in range(2)} == {"after the late one: True"}
    assert "did not end in order" not in program.output


def test_torchelastic_is_told_the_cause(start: Start, tmp_path: Path) -> None:
    error_file = tmp_path / "error.json"
    program = start(MAIN.format(body="raise ZeroDivisionError('the cause')"), TORCHELASTIC_ERROR_FILE=str(error_file))
    assert program.wait() == 70
    message = json.loads(error_file.read_text())["message"]
    assert message["message"] == "ZeroDivisionError: the cause"
    assert "Traceback" in message["extraInfo"]["py_callstack"]


def test_a_program_that_a_rank_starts_speaks_for_itself(start: Start) -> None:
    program = start(
        """
        import subprocess

        @entrypoint
        def main():
            if "inner" in sys.argv:
                raise ConfigError("inner key", "mend it")
            place = join_or_start(2)
            if place.rank == 0:
                inner = subprocess.run([sys.executable, __file__, "inner"], capture_output=True, text=True)
                note("inner", f"{inner.returncode} {inner.stderr}")

        main()
        """
    )
    assert program.wait() == 0, program.output
    assert program.note("inner") == "78 error: inner key\n  fix: mend it\n"
