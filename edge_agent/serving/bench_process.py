"""The child process that holds one model under measurement, seen from the parent.

A crash and a hang are answers here like any other; what they mean is bench.py's business.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from typing import IO, Any

from edge_agent.signals import signal_name
from edge_contract.errors import Reason


class Died(Exception):
    """A worker gave no answer: it crashed or hung."""

    def __init__(self, reason: Reason, what: str, next_step: str) -> None:
        super().__init__(what)
        self.reason, self.what, self.next_step = reason, what, next_step


class Worker:
    """A child process of bench_worker. Owned by one thread."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._pending = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "edge_agent.serving.bench_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def ask(self, *, extra_s: float = 0.0, **request: Any) -> dict[str, Any]:
        """One question, one answer. Raises Died."""
        try:
            os.write(_descriptor(self._process.stdin), json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            raise self._died() from None
        answer: dict[str, Any] = json.loads(self._line(time.monotonic() + self._timeout_s + extra_s))
        return answer

    def close(self) -> None:
        """End the child, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _line(self, deadline_s: float) -> bytes:
        source = _descriptor(self._process.stdout)
        while b"\n" not in self._pending:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([source], [], [], left_s)[0]:
                raise Died(
                    Reason.CANDIDATE_HUNG,
                    f"no answer within {self._timeout_s:g} s",
                    "leave this model out, or find what it waits for",
                )
            chunk = os.read(source, 1 << 16)
            if not chunk:
                raise self._died()
            self._pending += chunk
        line, self._pending = self._pending.split(b"\n", 1)
        return line

    def _died(self) -> Died:
        code = self._process.wait()
        how = f"killed by {signal_name(-code)}" if code < 0 else f"ended with code {code}"
        return Died(
            Reason.CANDIDATE_CRASHED,
            f"its process was {how}" if code < 0 else f"its process {how}",
            "do not deploy this model; another recipe or runtime version may not crash",
        )


def _descriptor(pipe: IO[bytes] | None) -> int:
    if pipe is None:
        raise RuntimeError("the child was started without pipes")
    return pipe.fileno()
