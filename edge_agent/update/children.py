"""Short-lived children of the control process: started, followed without blocking, killed at a deadline.

A child speaks JSON lines on standard output. Its crash, hang or memory bomb is a result, not an accident.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from edge_agent.signals import signal_name
from edge_agent.update.leash import Limits
from edge_contract.console import os_fault
from edge_contract.errors import BundleRejected, DeviceUnfit, Reason, StorageFault, TransferFailed

_LINE_LIMIT_BYTES = 1 << 20
_STDERR_TAIL = 400
NO_LIMITS = Limits()
_BY_EXIT_CODE = {
    BundleRejected.exit_code: Reason.LOAD_FAILED,
    TransferFailed.exit_code: Reason.REGISTRY_UNREACHABLE,
    DeviceUnfit.exit_code: Reason.DEVICE_UNFIT,
    StorageFault.exit_code: Reason.STORAGE_FAULT,
}


def no_thread(error: RuntimeError) -> StorageFault:
    """What `Thread.start` says when there are too many tasks: the same attempt may work later."""
    return StorageFault(
        Reason.STORAGE_FAULT, f"no thread can be made now: {error}", "free memory or raise TasksMax"
    )


class Ended(NamedTuple):
    """How a child ended: its exit code (negative: killed by that signal), its last line, whether it hung."""

    code: int
    last: Mapping[str, Any]
    hung: bool
    stderr: str

    def failure(self) -> tuple[Reason, str]:
        """Reason code and sentence of a child that did not end well."""
        told = self.last.get("error", self.last)
        if self.code > 0 and isinstance(told, dict) and "what" in told:
            step = told.get("next_step", "")
            return self._reason(told.get("reason")), f"{told['what']} → {step}" if step else str(told["what"])
        if self.hung:
            return Reason.CANDIDATE_HUNG, "the child did not end in time and was killed"
        if self.code < 0:
            name = signal_name(-self.code)
            return Reason.CANDIDATE_CRASHED, f"the child was killed by {name}. {self.stderr}".strip()
        return Reason.CANDIDATE_CRASHED, f"the child ended with code {self.code}. {self.stderr}".strip()

    def _reason(self, code: Any) -> Reason:
        """The child's own code; one that only a newer agent knows says no more than whose fault it was."""
        try:
            return Reason(code)
        except ValueError:
            return _BY_EXIT_CODE.get(self.code, Reason.CANDIDATE_CRASHED)


class Child:
    """One running `edge-agent` subcommand. Owned by one thread; two helper threads only read its pipes.

    It dies with the control process, however that ends: see leash.py.
    """

    def __init__(self, arguments: list[str], *, timeout_s: float, limits: Limits = NO_LIMITS) -> None:
        """Raises StorageFault when no process can be made now."""
        self._deadline_s = time.monotonic() + timeout_s
        self._lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._last: dict[str, Any] = {}
        self._stderr = b""
        self._hung = False
        leash = ["-m", "edge_agent.update.leash", str(os.getpid()), json.dumps(limits)]
        try:
            self._process = subprocess.Popen(
                [sys.executable, *leash, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except OSError as e:  # no memory, too many tasks: the same attempt may work later
            raise os_fault(e) from e
        self._readers = [
            threading.Thread(target=self._read_lines, daemon=True),
            threading.Thread(target=self._read_stderr, daemon=True),
        ]
        try:
            for reader in self._readers:
                reader.start()
        except RuntimeError as e:  # Python's word for "too many tasks"
            self.kill()
            raise no_thread(e) from e

    def lines(self) -> list[dict[str, Any]]:
        """Lines that arrived since the last call."""
        found = []
        while not self._lines.empty():
            found.append(self._lines.get())
        return found

    def ended(self) -> Ended | None:
        """How it ended, or None while it runs. Kills it when its time is over."""
        code = self._process.poll()
        if code is None:
            if time.monotonic() > self._deadline_s:
                self._hung = True
                self._process.kill()
            return None
        for reader in self._readers:
            reader.join(timeout=5)
        tail = self._stderr.decode(errors="replace").strip()[-_STDERR_TAIL:]
        return Ended(code, self._last, self._hung, " ".join(tail.split()))

    def kill(self) -> None:
        """End it now and reap it."""
        self._process.kill()
        self._process.wait()

    def _read_lines(self) -> None:
        stream = self._process.stdout
        if stream is None:
            raise RuntimeError("child started without a pipe")
        with stream:
            while line := stream.readline(_LINE_LIMIT_BYTES):
                try:
                    value = json.loads(line)
                except ValueError:
                    continue  # not ours: a library's print; the outcome is in the exit code and last line
                if isinstance(value, dict):
                    self._last = value
                    self._lines.put(value)

    def _read_stderr(self) -> None:
        stream = self._process.stderr
        if stream is None:
            raise RuntimeError("child started without a pipe")
        with stream:
            while chunk := os.read(stream.fileno(), 4096):
                self._stderr = (self._stderr + chunk)[-4 * _STDERR_TAIL :]
