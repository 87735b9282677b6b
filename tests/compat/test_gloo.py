"""Groups over gloo on one event loop: they reduce as torch's own, and no group adds a thread for its loop."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from veomni.compat import gloo
from veomni.errors import LaunchError
from veomni.testing.ranks import run_ranks

GROUPS = 8


def threads_and_sums(shared: bool, interface: str) -> tuple[int, list[float]]:
    """The threads that groups add, and what each of them reduces."""
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    (gloo.share_loop if shared else gloo.use_own_loops)()
    dist.init_process_group("gloo")
    before = len(os.listdir("/proc/self/task"))
    groups = [dist.new_group([0, 1]) for _ in range(GROUPS)]
    found = []
    for number, group in enumerate(groups):
        value = torch.tensor(float(number + dist.get_rank()))
        dist.all_reduce(value, group=group)
        found.append(value.item())
    return len(os.listdir("/proc/self/task")) - before, found


def test_an_interface_that_is_not_there_is_an_input_error():
    with pytest.raises(Exception, match="GLOO_SOCKET_IFNAME is lo,nosuch0") as caught:
        run_ranks(threads_and_sums, 1, True, "lo,nosuch0", init=False)
    assert isinstance(caught.value.exceptions[0], LaunchError)


@pytest.mark.parametrize("interface", ["lo,", ""])
def test_groups_share_a_loop(interface):
    added = {}
    for shared in (False, True):
        for threads, sums in run_ranks(threads_and_sums, 2, shared, interface, init=False):
            assert sums == [2.0 * number + 1 for number in range(GROUPS)]
            added[shared] = threads
    assert added[False] - added[True] == GROUPS
