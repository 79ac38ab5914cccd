"""A device: the real `edge-agent` processes on a configuration of their own, watched from outside."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from edge_agent import config as configuration
from edge_agent.layout import Layout
from tests.support.broker import Mosquitto, free_port
from tests.support.models import Array, samples
from tests.support.serving import Answer, Client, binary_output
from tests.support.waiting import wait_for

TENANT = "tests"
# Everything that waits for minutes on a real device waits for moments here.
QUICK: dict[str, dict[str, Any]] = {
    "broker": {"will_delay_s": 1, "reconnect_max_s": 1.0},
    "registry": {"timeout_s": 3.0, "retries": 2},
    "serving": {"drain_timeout_s": 5.0},
    "update": {
        "probation_s": 0.4,
        "probation_min_requests": 0,
        "probation_max_s": 20.0,
        "preflight_latency_factor": 1000.0,
        "retry_s": 0.5,
        "max_attempts": 20,
        "disk_reserve_bytes": 0,
    },
    "telemetry": {"interval_s": 1.0, "resend_s": 2.0},
}


class Device:
    """One agent. State and sockets lie in a short folder of its own, which `close` removes."""

    def __init__(
        self,
        name: str,
        *,
        broker: Mosquitto | int,
        registry_url: str,
        root: Path,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        tcp_port: int = 0,
    ) -> None:
        """`settings` are sections of the TOML file over QUICK."""
        self.name = name
        self.folder = Path(tempfile.mkdtemp(prefix="ew-"))
        self.tcp = f"127.0.0.1:{tcp_port or free_port()}"
        self._sections = {key: dict(values) for key, values in QUICK.items()}
        self._sections["broker"]["port"] = broker if isinstance(broker, int) else broker.port
        self._sections["registry"] |= {"url": registry_url, "root": str(root)}
        self._sections["serving"]["tcp"] = self.tcp
        self.config_path = self.folder / "agent.toml"
        self.configure(**(settings or {}))
        self.config = configuration.load(self.config_path)
        self.layout = Layout(self.config)
        self.log_path = self.folder / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}  # beside ours, for all processes that are started from now on

    def configure(self, **settings: Mapping[str, Any]) -> None:
        """Change sections of the TOML file; it counts from the next start on."""
        for key, values in settings.items():
            self._sections[key] |= values
        top = {
            "tenant": TENANT,
            "device": self.name,
            "state_dir": f"{self.folder}/state",
            "run_dir": f"{self.folder}/run",
        }
        self.config_path.write_text(_toml(top, self._sections))

    def start(self, command: str = "up") -> Device:
        """Start `edge-agent up` (or `run`, `serve`) without waiting."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "edge_agent", command, "--config", str(self.config_path)],
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
            )
        return self

    def stop(self) -> int | None:
        """SIGTERM and wait; returns its exit code."""
        process, self.process = self.process, None
        if process is None:
            return None
        process.terminate()
        return process.wait(30)

    def kill(self) -> None:
        """SIGKILL to the process that was started, and to no other."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait(30)

    def close(self) -> None:
        """End it and remove its folder."""
        self.stop()
        shutil.rmtree(self.folder)

    @property
    def log(self) -> str:
        """What all its processes have written."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def pids(self, command: str = "") -> list[int]:
        """Processes of this device, by their command lines; with `command` only those of that subcommand."""
        pattern = rf"edge_agent.*\0{command}\0" if command else "edge_agent"
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                line = (folder / "cmdline").read_bytes().decode(errors="replace")
                mine = str(self.folder) in line or str(self.folder) in _parents_line(folder)
                if mine and re.search(pattern, line):
                    found.append(int(folder.name))
        return sorted(found)

    def pid(self, command: str, timeout_s: float = 10.0) -> int:
        """The one process of a subcommand."""
        found = wait_for(lambda: self.pids(command), f"a process `{command}`", timeout_s=timeout_s)
        return found[0]

    def kill_one(self, command: str) -> int:
        """SIGKILL to the process of a subcommand; returns its process id."""
        pid = self.pid(command)
        os.kill(pid, signal.SIGKILL)
        return pid

    def status(self) -> dict[str, Any]:
        """`edge-agent status --json`."""
        done = subprocess.run(
            [sys.executable, "-m", "edge_agent", "status", "--json", "--config", str(self.config_path)],
            capture_output=True,
            check=True,
            timeout=30,
            env={**os.environ, **self.environment},
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def model(self, name: str) -> dict[str, Any]:
        """One model in `status`."""
        found: dict[str, Any] = next(m for m in self.status()["models"] if m["name"] == name)
        return found

    def client(self, timeout_s: float = 10.0) -> Client:
        """A client on TCP."""
        return Client(self.tcp, timeout_s)

    def wait_serving(self, timeout_s: float = 20.0) -> None:
        """Until the inference process answers."""

        def look() -> bool:
            with suppress(OSError), self.client(1.0) as client:
                return client.request("GET", "/v2/health/live").status == 200
            return False

        wait_for(look, f"{self.name} to serve", timeout_s=timeout_s)

    def infer(self, model: str, x: Array | None = None, timeout_s: float = 10.0) -> Answer:
        """One request on a new connection."""
        with self.client(timeout_s) as client:
            return client.infer(model, samples(4) if x is None else x)

    def scores(self, model: str, x: Array | None = None, timeout_s: float = 10.0) -> Array:
        """The answer of the standard net."""
        answer = self.infer(model, x, timeout_s)
        assert answer.status == 200, answer
        return binary_output(answer)

    def __enter__(self) -> Device:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            print(self.log)
        self.close()


class Load:
    """Requests without a pause from threads of their own; counts what came back."""

    def __init__(
        self, device: Device, model: str, x: Array, clients: int = 2, pause_s: float = 0.002
    ) -> None:
        self._device, self._model, self._x, self._pause_s = device, model, x, pause_s
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(clients)]
        self.answers: list[tuple[float, int]] = []
        self.failures: list[str] = []

    @property
    def statuses(self) -> set[int]:
        """HTTP statuses seen so far."""
        return {status for _, status in self.answers}

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with self._device.client() as client:
                    while not self._stop.is_set():
                        status = client.infer(self._model, self._x).status
                        self.answers.append((time.monotonic(), status))
                        time.sleep(self._pause_s)
            except (OSError, http.client.HTTPException) as e:
                self.failures.append(repr(e))
                time.sleep(0.05)

    def wait_for(self, count: int) -> None:
        """Until so many more answers came."""
        wanted = len(self.answers) + count
        wait_for(lambda: len(self.answers) >= wanted, f"{count} answers")


@contextmanager
def load_on(device: Device, model: str, x: Array, clients: int = 2, pause_s: float = 0.002) -> Iterator[Load]:
    """Load for the length of a block."""
    load = Load(device, model, x, clients, pause_s)
    for thread in load._threads:
        thread.start()
    try:
        yield load
    finally:
        load._stop.set()
        for thread in load._threads:
            thread.join(20)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _parents_line(folder: Path) -> str:
    """The command line of a process's parent: a preflight names a store folder, not the configuration."""
    parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
    return (Path("/proc") / parent / "cmdline").read_bytes().decode(errors="replace")


def _toml(top: Mapping[str, Any], sections: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"{key} = {json.dumps(value)}" for key, value in top.items()]
    for name, values in sections.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"
