"""Latency, load time and memory of candidates: by running `edge-agent bench --json`, the path that serves.

The optimizer never times a model itself.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from edge_contract import canonical
from edge_contract.bench import BenchReport
from edge_contract.errors import InputRejected, Reason, Refused
from optimizer.text import first_line

# Alternating rounds: enough for a steady median, short enough to stay at a few seconds for six candidates.
ROUNDS = 15
ROUND_S = 0.04
_POLL_S = 0.2
_GRACE_S = 3.0
# A process that imports the runtime and loads a small model.
_START_S = 0.7
_LIMIT_BYTES = 4 << 20


def agent_command() -> list[str]:
    """How to start edge-agent: the one installed beside this program, else the one on PATH.

    Raises InputRejected where there is none.
    """
    beside = Path(sys.executable).with_name("edge-agent")
    found = str(beside) if beside.is_file() else shutil.which("edge-agent")
    if found is None:
        raise InputRejected(
            Reason.RUNTIME_MISSING,
            "edge-agent is not installed, and candidates are measured with it",
            "install edgeward[optimizer] in this environment",
        )
    return [found]


def expected_s(models: int) -> float:
    """About how long measuring that many models takes, in seconds."""
    return models * (ROUNDS * ROUND_S + _START_S) + _START_S


def bench(
    agent: Sequence[str],
    models: Sequence[Path],
    sample: Path,
    *,
    threads: int,
    timeout_s: float,
    waiting: Callable[[float], None] = lambda _elapsed_s: None,
) -> BenchReport:
    """Measure `models`, the first of which is the reference of the ratios, on the inputs in `sample`.

    `waiting` is called a few times a second with the time since the start. Raises Refused where the
    benchmark itself fails or takes longer than `timeout_s` for each model.
    """
    command = [
        *agent,
        "bench",
        "--json",
        *("--threads", str(threads), "--rounds", str(ROUNDS), "--round-s", str(ROUND_S)),
        *("--inputs", str(sample), "--"),
        *map(str, models),
    ]
    code, output, errors = _run(command, timeout_s * len(models), waiting)
    try:
        report = canonical.from_bytes(output, BenchReport, limit_bytes=_LIMIT_BYTES)
    except canonical.DecodeFault as e:
        detail = _said(output, errors) or first_line(e)
        raise _failed(f"edge-agent bench ended with status {code}: {detail}") from e
    if len(report.results) != len(models):
        raise _failed(f"edge-agent bench measured {len(report.results)} of {len(models)} models")
    return report


def _said(output: bytes, errors: bytes) -> str:
    """Why the benchmark failed, in its own words: the error it prints as JSON, else its last line."""
    try:
        told = canonical.parse(output)
        return f"{told['error']['what']} [{told['error']['reason']}]"
    except (canonical.DecodeFault, KeyError, TypeError):
        lines = (errors or output).decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""


def _run(command: list[str], limit_s: float, waiting: Callable[[float], None]) -> tuple[int, bytes, bytes]:
    started = time.monotonic()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            while True:
                elapsed_s = time.monotonic() - started
                if elapsed_s > limit_s:
                    raise _failed(f"edge-agent bench took longer than {limit_s:.0f} s")
                try:
                    output, errors = process.communicate(timeout=_POLL_S)
                except subprocess.TimeoutExpired:
                    waiting(elapsed_s)
                else:
                    return process.returncode, output, errors
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask first: the benchmark has processes of its own to end."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    process.kill()


def _failed(what: str) -> Refused:
    return Refused(
        Reason.CANDIDATE_CRASHED,
        what,
        "run `edge-agent bench` on the model by hand to see more; nothing has been written",
    )
