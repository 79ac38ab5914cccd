"""`edge-agent up`: both processes under one small parent, for machines without systemd.

It does what systemd's units do: holds the sockets, so that a restart of the inference process queues
requests instead of refusing them; restarts what falls over; ends everything when it ends.
Single-threaded on purpose: it forks.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from edge_agent import files
from edge_agent.config import Config, host_port
from edge_agent.layout import Layout
from edge_agent.signals import signal_name
from edge_contract.errors import DeviceUnfit, Reason

log = logging.getLogger("edge_agent.up")

_BACKLOG = 512
_FIRST_FD = 3
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.05
_GRACE_S = 10.0
# A process that lived this long has earned an immediate restart.
_GOOD_LIFE_S = 5.0
_PAUSE_CAP_S, _PAUSE_DOUBLINGS = 5.0, 16


@dataclass
class _Program:
    """One supervised program. `pid` is 0 while it does not run."""

    command: str
    sockets: dict[str, socket.socket] = field(default_factory=dict)
    pid: int = 0
    started_s: float = 0.0
    failures: int = 0
    next_start_s: float = 0.0


def run(config_path: Path, config: Config) -> None:
    """Run both programs until SIGTERM or SIGINT; then end both."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(levelname)s %(message)s")
    layout = Layout(config)
    files.make_folder(layout.run)
    if files.try_lock(layout.up_lock) is None:  # held until this process ends
        raise DeviceUnfit(
            Reason.NOT_ALLOWED,
            f"another `edge-agent up` runs with {layout.run}",
            "stop it first, or give this one its own run_dir and state_dir",
        )
    programs = [_Program("serve", _listen(config, layout)), _Program("run")]
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _frame: stopping.append(n))
    try:
        while not stopping:
            for program in programs:
                _keep(program, config_path)
            time.sleep(_POLL_S)
    finally:
        _end(programs)
        for path in (layout.control_socket, layout.inference_socket):
            path.unlink(missing_ok=True)


def _listen(config: Config, layout: Layout) -> dict[str, socket.socket]:
    """The sockets of the inference process, by the names that its systemd units give them."""
    host, port = host_port(config.serving.tcp)
    try:
        tcp = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=_BACKLOG
        )
    except OSError as e:
        raise DeviceUnfit(
            Reason.BAD_CONFIG,
            f"cannot listen on {config.serving.tcp}: {e.strerror}",
            "stop what uses the port, or set [serving] tcp to another",
        ) from e
    return {
        "http": tcp,
        "local": _unix(layout.inference_socket, 0o660),
        "control": _unix(layout.control_socket, 0o600),
    }


def _unix(path: Path, mode: int) -> socket.socket:
    files.make_folder(path.parent)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o777 & ~mode)
    try:
        listener.bind(str(path))
    except OSError as e:
        raise DeviceUnfit(
            Reason.BAD_CONFIG,
            f"cannot listen on {path}: {e.strerror or e}",
            "set run_dir to a short path that this user can write",
        ) from e
    finally:
        os.umask(mask)
    listener.listen(_BACKLOG)
    return listener


def _keep(program: _Program, config_path: Path) -> None:
    now_s = time.monotonic()
    if program.pid:
        pid, status = os.waitpid(program.pid, os.WNOHANG)
        if pid == 0:
            return
        lived_s = now_s - program.started_s
        program.pid = 0
        program.failures = 0 if lived_s > _GOOD_LIFE_S else program.failures + 1
        program.next_start_s = now_s + _pause_s(program.failures)
        log.warning("`%s` ended (%s) after %.1f s", program.command, _how(status), lived_s)
    if now_s >= program.next_start_s:
        program.started_s = now_s
        program.pid = _start(program, config_path)


def _pause_s(failures: int) -> float:
    """After so many short lives in a row. A program may fail for months: no power may outgrow a float."""
    return min(_PAUSE_CAP_S, 0.1 * float(1 << min(failures, _PAUSE_DOUBLINGS)) - 0.1)


def _how(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"code {code}" if code >= 0 else f"killed by {signal_name(-code)}"


def _start(program: _Program, config_path: Path) -> int:
    """Fork and exec with systemd's socket protocol: descriptors from 3 on, LISTEN_PID is the child's."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)
        # Copies above all targets first, so that no dup2 closes a socket that is still needed.
        floor = (
            _FIRST_FD + len(program.sockets) + max([s.fileno() for s in program.sockets.values()], default=0)
        )
        high = []
        for offset, listener in enumerate(program.sockets.values()):
            os.dup2(listener.fileno(), floor + offset)
            high.append(floor + offset)
        for offset, descriptor in enumerate(high):
            os.dup2(descriptor, _FIRST_FD + offset, inheritable=True)
        environment = dict(os.environ)
        if program.sockets:
            environment["LISTEN_PID"] = str(os.getpid())
            environment["LISTEN_FDS"] = str(len(program.sockets))
            environment["LISTEN_FDNAMES"] = ":".join(program.sockets)
        command = [sys.executable, "-m", "edge_agent", program.command, "--config", str(config_path)]
        for descriptor in high:
            os.close(descriptor)
        os.execve(sys.executable, command, environment)  # noqa: S606 - no shell is meant
    finally:
        os._exit(127)


def _end(programs: list[_Program]) -> None:
    for program in programs:
        if program.pid:
            os.kill(program.pid, signal.SIGTERM)
    deadline_s = time.monotonic() + _GRACE_S
    for program in programs:
        while program.pid:
            pid, _ = os.waitpid(program.pid, os.WNOHANG)
            if pid:
                program.pid = 0
            elif time.monotonic() > deadline_s:
                os.kill(program.pid, signal.SIGKILL)
                os.waitpid(program.pid, 0)
                program.pid = 0
            else:
                time.sleep(_POLL_S)
