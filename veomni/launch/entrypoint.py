"""The frame around a script's ``main``: errors become exit codes, and process groups are left in order."""

import contextlib
import faulthandler
import functools
import hashlib
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, ParamSpec, TypeVar

from veomni.errors import EXIT_PREEMPTED
from veomni.launch.rank_end import Failure
from veomni.launch.signals import URGENT, take_default
from veomni.logging import create_logger

_FAREWELL = timedelta(seconds=10)

logger = create_logger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


def entrypoint(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a script's ``main`` so that every end of it is an orderly one.

    Bad input (:class:`~veomni.errors.InputError`) prints its message alone and exits with 78; other errors print a
    traceback and exit with their ``exit_code``, or 70. ``sys.exit`` passes. Only one of several ranks prints: the
    supervisor the first failure, and under plain torchrun each node the same bad input once. Fatal signals dump the
    stack of every thread.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if sys.__stderr__ is not None:
            faulthandler.enable(sys.__stderr__)
        try:
            result = function(*args, **kwargs)
        except KeyboardInterrupt:
            _die_by_interrupt()
        except BaseException as error:
            _end(error)
        _leave_process_group()
        return result

    return run


def _end(error: BaseException) -> NoReturn:
    outcome, exiting = Failure.of(error), isinstance(error, SystemExit)
    if not _record(outcome) and not exiting and _claim_report(outcome):
        print(outcome.text, file=sys.stderr)
    orderly = exiting and outcome.exit_code in (0, EXIT_PREEMPTED)
    if _process_group_size() > 1 and not orderly:
        if isinstance(error, SystemExit) and isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        _flush()
        # The interpreter's own exit would wait for collectives that can no longer end, or be aborted by gloo's threads.
        os._exit(outcome.exit_code)
    _leave_process_group()
    if exiting:
        raise error
    raise SystemExit(outcome.exit_code) from None


def _record(outcome: Failure) -> bool:
    """Leave the failure for the supervisor; return whether it will print it."""
    try:
        if outcome.exit_code not in (0, EXIT_PREEMPTED):
            outcome.leave_for_torchelastic()
        return outcome.exit_code != 0 and outcome.leave()
    except OSError as error:
        logger.warning("the cause of this failure cannot be recorded: %s", error)
        return False


def _claim_report(outcome: Failure) -> bool:
    """Whether no other rank of this node has printed the same; ranks under plain torchrun share one log directory."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if outcome.traceback or not path:
        return True
    name = hashlib.sha256(outcome.message.encode()).hexdigest()[:16]
    try:
        (Path(path).parent.parent / f"reported-{name}").touch(exist_ok=False)
    except OSError as error:
        return not isinstance(error, FileExistsError)
    return True


def _die_by_interrupt() -> NoReturn:
    """End as a program without a handler ends, so that shells and supervisors see SIGINT and not a number."""
    _flush()
    take_default(signal.SIGINT)
    os._exit(128 + signal.SIGINT)


def _process_group_size() -> int:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not (distributed.is_available() and distributed.is_initialized()):
        return 0
    return int(distributed.get_world_size())


def _leave_process_group() -> None:
    """Wait a moment for the other ranks, then destroy the process group: gloo aborts at interpreter exit otherwise."""
    if not _process_group_size():
        return
    import torch.distributed as dist

    for number in URGENT:
        # The work is done: a signal that comes now could only spoil the exit code.
        with contextlib.suppress(ValueError):
            signal.signal(number, signal.SIG_IGN)
    try:
        work = dist.barrier(async_op=True)
        if work is not None:
            work.wait(_FAREWELL)
    except RuntimeError as error:
        logger.warning("another rank did not end in order: %s", str(error).splitlines()[0])
    dist.destroy_process_group()
    _flush()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
