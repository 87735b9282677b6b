"""Become a rank that cannot outlive its supervisor: ``python exec_rank.py SUPERVISOR_PID PROGRAM ARGS...``."""

import ctypes
import os
import signal
import sys

# Linux kills this process when its parent dies, and keeps that request across execve (man 2 PR_SET_PDEATHSIG).
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

if __name__ == "__main__":
    supervisor, *command = sys.argv[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != int(supervisor):  # it died before the request was made
        sys.exit(f"the supervisor {supervisor} is gone")
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # it requests a profile, and must not kill a rank that starts up
    os.execv(command[0], command)  # noqa: S606 (the very program that the user started)
