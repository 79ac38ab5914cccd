"""What the demo needs around the real programs: processes that end, a load of requests, bundles gone wrong.

Nothing here is a shortcut into the product: it starts executables, speaks HTTP and MQTT, writes files.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from edge_contract import canonical
from edge_contract import manifest as m

BIN = Path(sys.executable).parent


class StepFailed(Exception):
    """A step of the demo did not show what it should."""


@dataclass(frozen=True, slots=True)
class Ran:
    """A finished command."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Standard output as JSON; its last line when it is a stream of documents."""
        try:
            return json.loads(self.out)
        except ValueError:
            return json.loads(self.out.strip().splitlines()[-1])


class Processes:
    """Everything the demo starts; `end` leaves nothing running."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []
        self.environment = {**os.environ, "COLUMNS": "110"}

    def run(self, program: str, *arguments: object, expect: int | None = 0, timeout_s: float = 300) -> Ran:
        """Run to the end. Raises StepFailed when the exit code is not the expected one."""
        command = [str(BIN / program), *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, env=self.environment, check=False
        )
        if expect is not None and done.returncode != expect:
            said = (done.stderr or done.stdout).strip()[-800:]
            raise StepFailed(f"`{program} {arguments[0]}` ended with {done.returncode}: {said}")
        return Ran(done.returncode, done.stdout, done.stderr)

    def start(self, name: str, program: str, *arguments: object) -> subprocess.Popen[bytes]:
        """Start in the background, with its output in a log file."""
        with (self._logs / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [str(BIN / program), *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
            )
        self._running.append((name, process))
        return process

    def end(self) -> None:
        """SIGTERM to all, the last started first; SIGKILL to whoever does not listen."""
        for _, process in reversed(self._running):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()


def free_port() -> int:
    """A loopback port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, what: str, timeout_s: float = 20) -> None:
    """Until somebody accepts connections. Raises StepFailed."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        with socket.socket() as probe:
            probe.settimeout(0.2)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise StepFailed(f"{what} does not listen on port {port}")


class Classifier:
    """A client of the device: images in, classes out, over the Open Inference Protocol's binary form."""

    def __init__(self, port: int, model: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self._path = f"/v2/models/{model}/infer"

    def classify(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """Top-1 class of each image ([N, 1, 28, 28], 0..1). Raises StepFailed on any HTTP error."""
        head = json.dumps(
            {
                "inputs": [
                    {
                        "name": "image",
                        "datatype": "FP32",
                        "shape": list(images.shape),
                        "parameters": {"binary_data_size": images.nbytes},
                    }
                ],
                "parameters": {"binary_data_output": True},
            }
        ).encode()
        headers = {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(len(head)),
        }
        self._connection.request("POST", self._path, head + images.tobytes(), headers)
        response = self._connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise StepFailed(f"HTTP {response.status}: {body[:300]!r}")
        scores = np.frombuffer(body[int(response.headers["Inference-Header-Content-Length"]) :], np.float32)
        return scores.reshape(len(images), -1).argmax(axis=1)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


@dataclass
class Load:
    """Clients that classify single test images as fast as they are answered, until stopped."""

    port: int
    model: str
    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    clients: int = 4
    answered: int = 0
    failures: list[str] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)
    _right: list[tuple[float, bool]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._client, args=(i,)) for i in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def accuracy(self, since_s: float, until_s: float) -> float:
        """Share of right answers between two monotonic times; NaN without any."""
        marks = [right for at_s, right in list(self._right) if since_s <= at_s < until_s]
        return sum(marks) / len(marks) if marks else float("nan")

    def _client(self, number: int) -> None:
        client = Classifier(self.port, self.model)
        order = np.random.default_rng(number).permutation(len(self.images))
        turn = 0
        while not self._stop.is_set():
            i = order[turn % len(order)]
            turn += 1
            started_s = time.monotonic()
            try:
                answer = client.classify(self.images[i : i + 1])[0]
            except (OSError, http.client.HTTPException, StepFailed) as e:
                self.failures.append(repr(e))
                client.close()
                self._stop.wait(0.05)
                continue
            now_s = time.monotonic()
            self.answered += 1
            self.latencies_ms.append((now_s - started_s) * 1000)
            self._right.append((now_s, bool(answer == self.labels[i])))
            self._stop.wait(0.004)  # a client thinks, too; the device's cores are shared with all of this
        client.close()


def recast(bundle: Path, target: Path, version: str, release: int, model: bytes | None = None) -> Path:
    """A copy of a bundle under another version, with another model file if one is given.

    Everything is consistent (digests, sizes), so that it can be signed and published: only the golden
    vectors still say what the original model answered.
    """
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(bundle, target)
    manifest = m.from_bytes((bundle / "manifest.json").read_bytes())
    files = manifest.files
    if model is not None:
        digest = canonical.sha256_hex(model)
        files = [replace(f, size_bytes=len(model), sha256=digest) if f.role == "model" else f for f in files]
        blob = target / m.blob_path(digest)
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(model)
    changed = replace(manifest, version=version, release=release, files=files)
    (target / "manifest.json").write_bytes(m.to_bytes(changed))
    return target


def flip_byte(path: Path) -> None:
    """Change one byte in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
