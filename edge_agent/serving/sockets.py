"""The listening sockets: passed by the service manager (sd_listen_fds(3)), or bound from the configuration.

Three roles: `http` (TCP), `local` (Unix socket for clients), `control` (Unix socket for the control
process). Passed sockets keep requests waiting while this process restarts; they are never unlinked here.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_agent.config import Config, host_port
from edge_agent.layout import Layout
from edge_contract.console import os_fault
from edge_contract.errors import InputRejected, Reason, StorageFault

HTTP, LOCAL, CONTROL = "http", "local", "control"
ROLES = (HTTP, LOCAL, CONTROL)
_FIRST_FD = 3
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


@dataclass(frozen=True, slots=True)
class Listeners:
    """Bound sockets by role, and the Unix sockets to remove at the end because they were bound here."""

    by_role: Mapping[str, list[socket.socket]]
    own_paths: tuple[Path, ...]

    @property
    def clients(self) -> list[socket.socket]:
        """Everything clients connect to."""
        return [*self.by_role[HTTP], *self.by_role[LOCAL]]

    @property
    def control(self) -> list[socket.socket]:
        """What the control process connects to."""
        return list(self.by_role[CONTROL])

    def describe(self) -> str:
        """Addresses, for the log."""
        return ", ".join(_address(s) for role in ROLES for s in self.by_role[role])

    def remove_own(self) -> None:
        """Remove the Unix sockets bound here."""
        for path in self.own_paths:
            path.unlink(missing_ok=True)


def open_all(config: Config, environ: Mapping[str, str] | None = None) -> Listeners:
    """Take what the service manager passed and bind the roles it did not.

    Raises InputRejected for a configuration that cannot be bound, StorageFault for paths that cannot.
    """
    layout = Layout(config)
    passed = inherited(os.environ if environ is None else environ)
    by_role = {role: passed.get(role, []) for role in ROLES}
    own: list[Path] = []
    try:
        if not by_role[HTTP]:
            by_role[HTTP] = [_bind_tcp(config.serving.tcp)]
        for role, path, mode in (
            (LOCAL, layout.inference_socket, 0o660),
            (CONTROL, layout.control_socket, 0o600),
        ):
            if not by_role[role]:
                by_role[role] = [_bind_unix(path, mode)]
                own.append(path)
    except (InputRejected, StorageFault):
        for listener in (s for opened in by_role.values() for s in opened):
            listener.close()
        Listeners(by_role, tuple(own)).remove_own()
        raise
    return Listeners(by_role, tuple(own))


def inherited(environ: Mapping[str, str], pid: int | None = None) -> dict[str, list[socket.socket]]:
    """Sockets passed to this process, by name; none when the variables are another process's.

    Raises InputRejected for a name that is no role.
    """
    if environ.get("LISTEN_PID") != str(os.getpid() if pid is None else pid):
        return {}
    passed = environ.get("LISTEN_FDS", "")
    count = int(passed) if passed.isdigit() else 0
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    found: dict[str, list[socket.socket]] = {}
    for i in range(count):
        name = names[i] if i < len(names) else ""
        if name not in ROLES:
            raise InputRejected(
                Reason.BAD_CONFIG,
                f"the service manager passed a socket named {name!r}; known are {', '.join(ROLES)}",
                "set FileDescriptorName= in the socket units",
            )
        found.setdefault(name, []).append(_adopt(_FIRST_FD + i))
    return found


def forget_inherited() -> None:
    """Remove the variables, so that no child takes the sockets for its own."""
    for name in _VARIABLES:
        os.environ.pop(name, None)


def _adopt(fd: int) -> socket.socket:
    os.set_inheritable(fd, False)
    adopted = socket.socket(fileno=fd)
    adopted.setblocking(False)
    return adopted


def _bind_tcp(address: str) -> socket.socket:
    host, port = host_port(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio switches Nagle's algorithm off; else answers wait 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as e:
        listener.close()
        raise InputRejected(
            Reason.BAD_CONFIG,
            f"serving.tcp: cannot listen on {address}: {e.strerror}",
            "stop whoever holds the port, or set another one",
        ) from e
    listener.setblocking(False)
    return listener


def _bind_unix(path: Path, mode: int) -> socket.socket:
    """Bind, then set the mode, then let asyncio listen: nobody can connect before the mode is right."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        _remove_stale(path)
        listener.bind(str(path))
        path.chmod(mode)
    except StorageFault:
        listener.close()
        raise
    except OSError as e:
        listener.close()
        e.filename = str(path)
        raise os_fault(e) from e
    listener.setblocking(False)
    return listener


def _remove_stale(path: Path) -> None:
    """Remove what a killed process left; never a socket somebody listens on, never another kind of file."""
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise _occupied(path, "is not a socket", "move it away, or set another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise _occupied(path, "is in use by another process", "stop that process first")


def _occupied(path: Path, what: str, next_step: str) -> StorageFault:
    return StorageFault(Reason.STORAGE_FAULT, f"{path} {what}", next_step)


def _address(listener: socket.socket) -> str:
    name = listener.getsockname()
    return f"unix:{name}" if listener.family == socket.AF_UNIX else f"http://{name[0]}:{name[1]}"
