"""One event loop for all gloo groups of a process, where torch makes one for each group.

A loop wakes a hundred times a second, and a mesh has some twenty gloo groups, on GPUs too, for tensors in host memory.
"""

import os
import socket
from functools import cache
from typing import Any

import torch.distributed as dist

from veomni.errors import LaunchError

GLOO: Any = getattr(dist, "ProcessGroupGloo", None)  # torch may be built without it
OWN_LOOP = GLOO.__init__ if hasattr(GLOO, "_Options") else None


def share_loop() -> None:
    """Make every gloo group that torch constructs from now on use one loop of the process."""
    if OWN_LOOP is not None:
        GLOO.__init__ = _on_shared_loop


def use_own_loops() -> None:
    """Restore torch's constructor; existing groups keep the loop that they have."""
    if OWN_LOOP is not None:
        GLOO.__init__ = OWN_LOOP


def _on_shared_loop(group: Any, *arguments: Any, **timeout: Any) -> None:
    """Construct a group with the options that torch derives from ``timeout``, except for the devices."""
    assert OWN_LOOP is not None
    if timeout:
        options = GLOO._Options()
        options._devices = _devices(os.getpid(), os.environ.get("GLOO_SOCKET_IFNAME", ""))
        options._timeout = timeout["timeout"]
        options._threads = 2 * len(options._devices)
        arguments += (options,)
    OWN_LOOP(group, *arguments)


@cache
def _devices(process: int, names: str) -> list[Any]:
    """Return the devices on the interfaces that torch chooses; cached by process, since a fork loses threads."""
    chosen = [name for name in names.split(",") if name]
    try:
        return [GLOO.create_device(interface=name) for name in chosen] or [GLOO.create_default_device()]
    except RuntimeError as error:
        there = ", ".join(name for _, name in socket.if_nameindex())
        problem = f"GLOO_SOCKET_IFNAME is {names}, which gloo cannot use: {error}"
        raise LaunchError(problem, f"name interfaces of this node ({there}), or unset it") from error
