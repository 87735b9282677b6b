"""How long a collective waits for the other ranks: ``NCCL_TIMEOUT`` goes before the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

from veomni.errors import LaunchError
from veomni.launch.environment import integer

_VARIABLE = "NCCL_TIMEOUT"
_LONGEST = 366 * 24 * 3600


def collective_timeout(env: Mapping[str, str]) -> timedelta | None:
    """Return what ``NCCL_TIMEOUT`` says, in whole seconds; None where it is unset or empty.

    The variable is the cluster's word on this run, for every backend and not NCCL's alone.

    Raises:
        LaunchError: it is not a whole number of seconds between 1 and a year.
    """
    if not env.get(_VARIABLE):
        return None
    seconds = integer(env, _VARIABLE)
    if not 1 <= seconds <= _LONGEST:
        raise LaunchError(f"{_VARIABLE} is {seconds}", f"give seconds between 1 and {_LONGEST}, or unset it")
    return timedelta(seconds=seconds)
