"""How a child of the control process starts: bound to its parent's life and to a limit of memory.

`python -m edge_agent.update.leash PARENT_PID MEMORY_BYTES ARGUMENT…` is `edge-agent ARGUMENT…` on a leash.
The child ties itself, because code between fork and exec is not safe in a process with threads. Without
it a candidate that hangs would outlive a killed control process and burn a core for ever.
"""

from __future__ import annotations

import ctypes
import os
import resource
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def _tie(parent: int, memory_bytes: int) -> None:
    # A service manager or a terminal signals the whole group. Only the parent ends a child, with SIGKILL:
    # otherwise a restart of the agent would look like a crash of the candidate.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it died before it could be tied to
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes:
        # Data, not address space: runtimes reserve much more than they use.
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))


if __name__ == "__main__":
    _tie(int(sys.argv[1]), int(sys.argv[2]))
    sys.argv[1:3] = []
    runpy.run_module("edge_agent", run_name="__main__", alter_sys=True)
