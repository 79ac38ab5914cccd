"""How a child of the control process starts: bound to its parent's life and to its limits.

`python -m edge_agent.update.leash PARENT_PID LIMITS ARGUMENT…` is `edge-agent ARGUMENT…` on a leash.
The child ties itself, because code between fork and exec is not safe in a process with threads. Without
it a candidate that hangs would outlive a killed control process and burn a core for ever.

Processes are not limited here: the kernel counts them by user, not by child; the unit's TasksMax counts them.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import runpy
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from edge_agent.update.confine import confine

_PR_SET_PDEATHSIG = 1
UNCONFINED = "unconfined"


class Limits(NamedTuple):
    """What a child may take; 0 is no limit.

    `memory_bytes` is data, not address space: runtimes reserve much more than they use. Over `cpu_s` the
    kernel ends it with SIGXCPU; over `file_bytes` a write fails. `confined` takes sockets and other
    programs away (confine.py); where that cannot be, the child's first line says so (UNCONFINED).
    `expendable` makes it the first that a kernel short of memory ends.
    """

    memory_bytes: int = 0
    cpu_s: int = 0
    open_files: int = 0
    file_bytes: int = 0
    confined: bool = False
    expendable: bool = False


def _tie(parent: int, limits: Limits) -> None:
    # A service manager or a terminal signals the whole group. Only the parent ends a child, with SIGKILL:
    # otherwise a restart of the agent would look like a crash of the candidate.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it died before it could be tied to
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    bounds = {
        resource.RLIMIT_DATA: limits.memory_bytes,
        resource.RLIMIT_CPU: limits.cpu_s,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_FSIZE: limits.file_bytes,
    }
    for kind, most in bounds.items():
        if most:
            hard = resource.getrlimit(kind)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            # At the hard limit of CPU time the signal is SIGKILL, which says nothing.
            resource.setrlimit(kind, (most, hard if kind == resource.RLIMIT_CPU else most))
    if limits.expendable:
        # It inherits the agent's score, which keeps the agent alive. Raising one's own is always allowed.
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    if limits.confined and (problem := confine()):
        print(json.dumps({"event": UNCONFINED, "why": problem}), flush=True)


if __name__ == "__main__":
    _tie(int(sys.argv[1]), Limits(*json.loads(sys.argv[2])))
    sys.argv[1:3] = []
    runpy.run_module("edge_agent", run_name="__main__", alter_sys=True)
