"""Join the ranks that a cluster started, or start them here."""

import os
import sys
import threading
from dataclasses import replace

from veomni.errors import LaunchError
from veomni.launch.environment import SINGLE, Environment, detect_environment
from veomni.launch.supervisor import supervise


def join_or_start(devices: int | None) -> Environment:
    """Return this process's place among the ranks, having started them if nothing else has.

    Under torchrun or srun, joins. Started by hand with ``devices`` above one, becomes the supervisor: runs this program
    again that many times, one rank each, and exits with the run's code. The variables that ``torch.distributed``'s
    ``env://`` rendezvous reads are set whenever there are several ranks.
    """
    if devices is not None and devices < 1:
        raise LaunchError(f"devices is {devices}", "ask for at least one", field="Launcher.devices")
    environment = detect_environment(os.environ)
    if environment is None:
        if devices is None or devices == 1:
            return SINGLE
        sys.exit(supervise(replace(SINGLE, world_size=devices, local_world_size=devices), _own_command()))
    if devices is not None and devices != environment.local_world_size:
        problem = f"devices is {devices} but {environment.local_world_size} {environment.kind} processes run here"
        fix = f"leave devices out, or start {devices} processes per node"
        raise LaunchError(problem, fix, field="Launcher.devices")
    os.environ.update(environment.variables())
    return environment


def _own_command() -> list[str]:
    """Return this program's command line: interpreter, its flags, script or ``-m`` or ``-c``, and arguments."""
    program = getattr(sys.modules["__main__"], "__file__", None)
    multiprocessing = sys.modules.get("multiprocessing.process")
    if multiprocessing is not None and multiprocessing.parent_process() is not None:
        reason = "a multiprocessing worker"
    elif "ipykernel" in sys.modules or hasattr(sys, "ps1"):
        reason = "an interactive session"
    elif program == "<stdin>" or (program is None and sys.argv[0] != "-c"):
        reason = "a program read from standard input"
    elif threading.current_thread() is not threading.main_thread():
        raise LaunchError("several processes cannot be started from a thread", "call launch from the main thread")
    else:
        return [sys.executable, *sys.orig_argv[1:]]
    problem = f"several processes cannot be started from {reason}"
    raise LaunchError(problem, "put the program in a file and start that, or use one device")
