"""Starts worker.py for one task and returns its result, or how the process died.

A task's process has a time limit and no say in what the user sees: its output is kept for its last line.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from edge_contract import canonical
from edge_contract.errors import Reason
from optimizer.worker import Fault, Result, Task

_ENVIRONMENT = {
    # Quantizers iterate over sets of names; a fixed seed makes their order, and so the file, the same.
    "PYTHONHASHSEED": "0",
    # Some builds of onnxruntime write a device id when they are imported.
    "ORT_DISABLE_TELEMETRY": "1",
}


def run(task: Task, timeout_s: float) -> Result:
    """Do `task` in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="edge-optimize-task-") as folder:
        task_path, result_path = Path(folder, "task.json"), Path(folder, "result.json")
        task_path.write_bytes(canonical.to_bytes(task))
        # -P: a file of the working directory must not stand in for a library.
        command = [sys.executable, "-P", "-m", "optimizer.worker", str(task_path), str(result_path)]
        died = execute(command, timeout_s)
        if died:
            return died
        return canonical.from_bytes(result_path.read_bytes(), Result)  # type: ignore[arg-type]


def execute(command: list[str], timeout_s: float) -> Fault | None:
    """Run `command` to its end; None if it ended well. The process never outlives this call."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **_ENVIRONMENT}
        )
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return Fault(Reason.CANDIDATE_HUNG, f"took longer than the {timeout_s:g} s allowed")
        finally:
            process.kill()
            process.wait()
        return None if code == 0 else Fault(Reason.CANDIDATE_CRASHED, _death(code, _last_line(log)))


def _death(code: int, last_line: str) -> str:
    said = f": {last_line}" if last_line else ""
    if code >= 0:
        return f"the process ended with status {code}{said}"
    name = signal.Signals(-code).name
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"the process was killed by {name}{hint}{said}"


def _last_line(log: object) -> str:
    log.seek(0)  # type: ignore[attr-defined]
    lines = log.read().decode(errors="replace").strip().splitlines()  # type: ignore[attr-defined]
    return lines[-1].strip()[:300] if lines else ""
