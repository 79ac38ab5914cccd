"""Starts worker.py for tasks and returns their results, or how a process died.

A task's process has a time limit and no say in what the user sees: its output is kept for its last line.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO, TypeVar

from edge_contract import canonical
from edge_contract.errors import Reason
from optimizer.worker import Fault, Result, Task

T = TypeVar("T")
R = TypeVar("R")

# Quantizers iterate over sets of names; a fixed seed makes their order, and so the file, the same.
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}


class Children:
    """The child processes of one run, started from any thread.

    Invariants: a process is in `_running` from its start to its end; after `stop` none is, and none is
    started any more. `_lock` guards both fields.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(self, task: Task) -> Result:
        """Do `task` in a process of its own."""
        with tempfile.TemporaryDirectory(prefix="edge-optimize-task-") as folder:
            task_path, result_path = Path(folder, "task.json"), Path(folder, "result.json")
            task_path.write_bytes(canonical.to_bytes(task))
            # -P: a file of the working directory must not stand in for a library.
            died = self.execute(
                [sys.executable, "-P", "-m", "optimizer.worker", str(task_path), str(result_path)]
            )
            if died:
                return died
            return canonical.from_bytes(result_path.read_bytes(), Result)  # type: ignore[arg-type]

    def execute(self, command: list[str]) -> Fault | None:
        """Run `command` to its end; None if it ended well. The process never outlives this call."""
        with tempfile.TemporaryFile() as log:
            process = self._start(command, log)
            try:
                code = process.wait(self.timeout_s)
            except subprocess.TimeoutExpired:
                return Fault(Reason.CANDIDATE_HUNG, f"took longer than the {self.timeout_s:g} s allowed")
            finally:
                process.kill()
                process.wait()
                with self._lock:
                    self._running.discard(process)
            return None if code == 0 else Fault(Reason.CANDIDATE_CRASHED, _death(code, _last_line(log)))

    def map(self, function: Callable[[T], R], items: Sequence[T], done: Callable[[int], None]) -> list[R]:
        """`function` of each item, as many at a time as there are cores, results in order.

        `done` is told how many are over. If anything raises, an interruption above all, the processes
        are stopped first: nobody waits for work that nobody wants.
        """
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                for count, future in enumerate(as_completed(futures), start=1):
                    future.result()
                    done(count)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop()
                raise
        return [future.result() for future in futures]

    def stop(self) -> None:
        """End every process now; `execute` refuses from here on."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.kill()

    def _start(self, command: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._stopped:
                raise RuntimeError("a process was to be started after the run had been stopped")
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **_ENVIRONMENT}
            )
            self._running.add(process)
            return process


def _death(code: int, last_line: str) -> str:
    said = f": {last_line}" if last_line else ""
    if code >= 0:
        return f"the process ended with status {code}{said}"
    name = signal.Signals(-code).name
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"the process was killed by {name}{hint}{said}"


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else ""
