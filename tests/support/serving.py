"""A real `edge-agent serve` process and plain clients of its sockets."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edge_agent import config as configuration
from edge_agent.config import Config
from edge_agent.layout import Layout
from tests.support.models import INPUT, Array

PATIENCE_S = 30.0
HEADER_LENGTH = "Inference-Header-Content-Length"


class Answer(NamedTuple):
    """A whole HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class Client:
    """One kept connection, TCP (`"host:port"`) or Unix (a path)."""

    def __init__(self, address: str | Path, timeout_s: float = PATIENCE_S) -> None:
        self._connection = _Connection(address, timeout_s)

    def request(
        self,
        method: str,
        path: str,
        body: bytes | str | dict[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request; a dictionary is sent as JSON."""
        data = json.dumps(body) if isinstance(body, dict) else body
        self._connection.request(method, path, data, dict(headers or {}))
        return self.finish()

    def infer(self, model: str, x: Array, *, binary: bool = True) -> Answer:
        """Ask the standard net."""
        if not binary:
            tensor = {
                "name": INPUT,
                "shape": list(x.shape),
                "datatype": "FP32",
                "data": x.ravel().tolist(),
            }
            return self.request("POST", f"/v2/models/{model}/infer", {"inputs": [tensor]})
        body, headers = binary_request({INPUT: ("FP32", x)})
        return self.request("POST", f"/v2/models/{model}/infer", body, headers)

    def begin(self, path: str, body: bytes, headers: Mapping[str, str]) -> None:
        """Send a POST without waiting for its answer."""
        self._connection.request("POST", path, body, dict(headers))

    def finish(self) -> Answer:
        """The answer to what was begun."""
        response = self._connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Connection(http.client.HTTPConnection):
    def __init__(self, address: str | Path, timeout_s: float) -> None:
        super().__init__(address if isinstance(address, str) else "localhost", timeout=timeout_s)
        self._path = address if isinstance(address, Path) else None

    def connect(self) -> None:
        if self._path is None:
            super().connect()
            return
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def binary_request(
    tensors: Mapping[str, tuple[str, Array]], *, extra: Mapping[str, Any] | None = None
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request with every tensor binary, and binary answers wanted."""
    blobs = [array.tobytes() for _, array in tensors.values()]
    header = {
        "inputs": [
            {
                "name": name,
                "shape": list(array.shape),
                "datatype": datatype,
                "parameters": {"binary_data_size": array.nbytes},
            }
            for name, (datatype, array) in tensors.items()
        ],
        "parameters": {"binary_data_output": True},
        **(extra or {}),
    }
    encoded = json.dumps(header).encode()
    return b"".join([encoded, *blobs]), {HEADER_LENGTH: str(len(encoded))}


def binary_output(answer: Answer) -> Array:
    """The only output of a binary answer, FP32."""
    length = int(answer.headers[HEADER_LENGTH.lower()])
    shape = json.loads(answer.body[:length])["outputs"][0]["shape"]
    return np.frombuffer(answer.body[length:], np.float32).reshape(shape)


def write_config(folder: Path, **serving: Any) -> Path:
    """An agent's TOML in `folder`, state and sockets below it; keywords go into [serving]."""
    values = {"tcp": "127.0.0.1:0", **serving}
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    path = folder / "agent.toml"
    path.write_text(
        f'tenant = "acme"\ndevice = "box-1"\nstate_dir = "{folder}/state"\nrun_dir = "{folder}/run"\n'
        "[serving]\n" + "\n".join(lines) + "\n"
    )
    return path


class Serving:
    """A started `edge-agent serve`. `tcp` is `host:port`; `local` and `control` are socket paths."""

    def __init__(
        self, config_path: Path, popen: Callable[[list[str], Any], subprocess.Popen[bytes]] | None = None
    ) -> None:
        self.config: Config = configuration.load(config_path)
        self.layout = Layout(self.config)
        self.local, self.control = self.layout.inference_socket, self.layout.control_socket
        self.log_path = config_path.with_name(f"serve-{time.monotonic_ns()}.log")
        command = [sys.executable, "-m", "edge_agent", "serve", "--config", str(config_path)]
        with self.log_path.open("wb") as log:
            start = popen or _popen
            self.process = start(command, log)

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    @property
    def tcp(self) -> str:
        """`host:port`, from the line that says where it listens."""
        self.wait_for_log("listening on")
        line = next(text for text in self.log() if "listening on" in text)
        return line.split("http://", 1)[1].split(",")[0].split(" ")[0]

    def log(self) -> list[str]:
        """What it has written so far."""
        return self.log_path.read_text(errors="replace").splitlines()

    def wait_for_log(self, text: str) -> None:
        """Until a line contains `text`, or the process ends, or patience does."""
        wait_until(
            lambda: any(text in line for line in self.log()) or self.process.poll() is not None,
            f"{text!r} in the log",
        )
        if not any(text in line for line in self.log()):
            raise AssertionError(f"ended with {self.process.poll()} without {text!r}: {self.log()}")

    def client(self, *, timeout_s: float = PATIENCE_S) -> Client:
        """A client on TCP."""
        return Client(self.tcp, timeout_s)

    def controller(self) -> Client:
        """A client on the control socket."""
        self.wait_for_log("listening on")
        return Client(self.control)

    def index(self) -> dict[str, dict[str, str]]:
        """The repository index, by name."""
        with self.controller() as client:
            answer = client.request("POST", "/v2/repository/index")
        return {entry["name"]: entry for entry in answer.json}

    def load(self, name: str, digest: str | None = None) -> Answer:
        """Load a version through the control socket."""
        body = {"parameters": {"digest": digest}} if digest else {}
        with self.controller() as client:
            return client.request("POST", f"/v2/repository/models/{name}/load", body)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal it and wait for its end; returns its exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    def kill(self) -> None:
        """End it at once, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE_S)


@contextmanager
def serving(config_path: Path) -> Iterator[Serving]:
    """A serving process for the length of a block."""
    process = Serving(config_path)
    try:
        yield process
    finally:
        process.kill()


def activated(
    sockets: Mapping[str, socket.socket], environ: Mapping[str, str] | None = None
) -> Callable[[list[str], Any], subprocess.Popen[bytes]]:
    """A starter that passes listening sockets as a service manager does, from descriptor 3 on."""

    def start(command: list[str], log: Any) -> subprocess.Popen[bytes]:
        # $$ is the shell's process id, which exec keeps: LISTEN_PID must be the program's own.
        fds = [s.fileno() for s in sockets.values()]
        if any(3 <= fd < 3 + len(fds) for fd in fds):
            raise AssertionError("a socket's descriptor is where another belongs")
        moves = " ".join(f"{3 + i}<&{fd}" for i, fd in enumerate(fds))
        script = f'LISTEN_PID=$$; export LISTEN_PID; exec "$@" {moves}'
        return subprocess.Popen(
            ["/bin/bash", "-c", script, "sh", *command],
            stderr=log,
            pass_fds=fds,
            env={
                **os.environ,
                "LISTEN_FDS": str(len(fds)),
                "LISTEN_FDNAMES": ":".join(sockets),
                **(environ or {}),
            },
        )

    return start


def wait_until(condition: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    """Poll until `condition` holds."""
    deadline_s = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {patience_s:g} s: {what}")
        time.sleep(0.01)


def _popen(command: list[str], log: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stderr=log)
