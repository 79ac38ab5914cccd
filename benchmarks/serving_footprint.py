"""What serving costs beside the model: start, memory, CPU per request.

`python benchmarks/serving_footprint.py [MODEL] [--requests 1000] [--json]`. MODEL is an .onnx or .tflite
file, a bundle folder or a store folder (default: the example's smaller net). It starts `edge-agent serve`
several times and ends it each time. Times of one machine are not those of another; the ratio travels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.config import Config
from edge_agent.layout import MANIFEST, Layout
from edge_agent.serving import package
from edge_agent.serving.backends.base import Loaded, Spec, open_model
from edge_agent.serving.tensors import Array, synthetic
from edge_contract import manifest as m
from edge_contract.manifest import Runtime

DEFAULT = Path(__file__).parent.parent / "examples" / "fashion_mnist" / "mobilenet.onnx"
STARTS = 5
IN_PROCESS_RUNS = 3000


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=DEFAULT)
    parser.add_argument("--requests", type=int, default=1000, help="requests a client sends (default 1000)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ew-") as name:
        folder = Path(name)
        layout = Layout(Config("bench", "box", state_dir=f"{folder}/state", run_dir=f"{folder}/run"))
        manifest, model = install(options.model, layout)
        loaded = open_model(Spec(model, manifest.runtime, manifest.session.threads))
        inputs = {t.name: synthetic(t, np.random.default_rng(0)) for t in manifest.inputs}
        alone_us = in_process_us(loaded, inputs)
        figures = measure(folder, layout, manifest, inputs, options.requests)
    figures["in_process_us"] = alone_us
    figures["ratio_1_client"] = figures["served_us_1_client"] / alone_us
    figures["overhead_us_1_client"] = figures["served_us_1_client"] - alone_us
    print(json.dumps(figures, indent=2) if options.json else table(options.model, figures))
    return 0


def table(model: Path, f: dict[str, float]) -> str:
    """Plain text."""
    return "\n".join(
        [
            f"{model}",
            f"start to first answered inference   {f['start_s']:.2f} s (median of {STARTS}, best "
            f"{f['best_start_s']:.2f})",
            f"resident memory, idle               {f['idle_mb']:.1f} MB",
            f"resident memory after the requests  {f['used_mb']:.1f} MB",
            f"CPU, idle                           {f['idle_cpu_share']:.2%} of a core",
            f"CPU per request, 1 client           {f['served_us_1_client']:.0f} µs",
            f"CPU per request, 4 clients          {f['served_us_4_clients']:.0f} µs",
            f"CPU per run in process              {f['in_process_us']:.0f} µs",
            f"served by in process                {f['ratio_1_client']:.1f} times, "
            f"{f['overhead_us_1_client']:.0f} µs more",
        ]
    )


def install(model: Path, layout: Layout) -> tuple[m.Manifest, Path]:
    """Place a model, or a whole version, in a store of its own and point at it."""
    manifest, files = bundled(model) if model.is_dir() else wrapped(model)
    data = m.to_bytes(manifest)
    store = layout.version(hashlib.sha256(data).hexdigest())
    store.mkdir(parents=True)
    (store / MANIFEST).write_bytes(data)
    for name, content in files.items():
        (store / name).write_bytes(content)
    link = layout.current(manifest.name)
    link.parent.mkdir(parents=True)
    link.symlink_to(store)
    return manifest, store / manifest.file("model").name


def bundled(folder: Path) -> tuple[m.Manifest, dict[str, bytes]]:
    """A bundle or store folder."""
    found = package.read(folder)
    return found.manifest, {name: path.read_bytes() for name, path in found.paths.items()}


def wrapped(path: Path) -> tuple[m.Manifest, dict[str, bytes]]:
    """A bare model with a manifest around it: its own answer to one synthetic sample is its golden vector."""
    runtime: Runtime = "tflite" if path.suffix == ".tflite" else "onnxruntime"
    loaded = open_model(Spec(path, runtime))
    inputs = {t.name: synthetic(t, np.random.default_rng(0)) for t in loaded.inputs}
    outputs = loaded.run(inputs)
    golden = {f"input:{k}": v for k, v in inputs.items()} | {f"output:{k}": v for k, v in outputs.items()}
    with tempfile.TemporaryFile() as file:
        np.savez(file, **golden)  # type: ignore[arg-type]
        file.seek(0)
        files = {path.name: path.read_bytes(), "golden.npz": file.read()}
    roles: dict[str, m.Role] = {path.name: "model", "golden.npz": "golden"}
    entries = [
        m.File(role, name, len(files[name]), hashlib.sha256(files[name]).hexdigest())
        for name, role in roles.items()
    ]
    nothing = hashlib.sha256(b"").hexdigest()
    manifest = m.Manifest(
        schema=1,
        name="bench",
        version="1",
        release=1,
        runtime=runtime,
        files=entries,
        inputs=loaded.inputs,
        outputs=loaded.outputs,
        needs=m.Needs(0),
        session=m.Session(),
        golden=m.Golden("golden.npz", 1, m.Tolerance(1e-3, 1e-3)),
        expected=m.Expected(1, 1, 1, 1, 1),
        lineage=m.Lineage(entries[0].sha256, "0", "fp32", "bench", nothing),
    )
    return manifest, files


def in_process_us(loaded: Loaded, inputs: dict[str, Array]) -> float:
    """CPU per run without any serving around it."""
    for _ in range(100):
        loaded.run(inputs)
    begun_s = time.process_time()
    for _ in range(IN_PROCESS_RUNS):
        loaded.run(inputs)
    return (time.process_time() - begun_s) / IN_PROCESS_RUNS * 1e6


def measure(
    folder: Path, layout: Layout, manifest: m.Manifest, inputs: dict[str, Array], requests: int
) -> dict[str, float]:
    """Start, ask, watch, stop."""
    config = folder / "agent.toml"
    config.write_text(
        f'tenant = "bench"\ndevice = "box"\nstate_dir = "{layout.state}"\nrun_dir = "{layout.run}"\n'
        '[serving]\ntcp = "127.0.0.1:0"\n'
    )
    request = binary_request(manifest, inputs)

    def ask(count: int) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(30)
            connection.connect(str(layout.inference_socket))
            for _ in range(count):
                connection.sendall(request)
                read_answer(connection)

    starts: list[float] = []
    for number in range(STARTS):
        process, took_s = start(config, ask)
        starts.append(took_s)
        if number == STARTS - 1:
            figures = watch(process.pid, ask, requests)
        process.terminate()
        process.wait(timeout=60)
    return {"start_s": statistics.median(starts), "best_start_s": min(starts), **figures}


def start(config: Path, ask: Callable[[int], None]) -> tuple[subprocess.Popen[bytes], float]:
    """A process that has answered once, and how long that took from its creation."""
    begun_s = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_agent", "serve", "--config", str(config)], stderr=subprocess.DEVNULL
    )
    while True:
        try:
            ask(1)
        except OSError as e:
            if process.poll() is not None or time.monotonic() - begun_s > 60:
                raise SystemExit(f"edge-agent serve does not start ({e})") from e
            time.sleep(0.002)
        else:
            return process, time.monotonic() - begun_s


def watch(pid: int, ask: Callable[[int], None], requests: int) -> dict[str, float]:
    """Memory and CPU of a server while nobody, one client and four clients ask."""
    idle_mb = resident_mb(pid)
    before_s = cpu_s(pid)
    time.sleep(5)
    idle_share = (cpu_s(pid) - before_s) / 5
    ask(200)  # warm
    one_us = cpu_us(pid, requests, lambda: ask(requests))
    used_mb = resident_mb(pid)

    def four() -> None:
        threads = [threading.Thread(target=ask, args=(requests // 4,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    four_us = cpu_us(pid, requests // 4 * 4, four)
    return {
        "idle_mb": idle_mb,
        "used_mb": used_mb,
        "idle_cpu_share": idle_share,
        "served_us_1_client": one_us,
        "served_us_4_clients": four_us,
    }


def cpu_us(pid: int, requests: int, work: Callable[[], None]) -> float:
    """CPU of process `pid` per request while `work` runs."""
    before_s = cpu_s(pid)
    work()
    return (cpu_s(pid) - before_s) / requests * 1e6


def cpu_s(pid: int) -> float:
    """User and system time, from the scheduler's own count in ns (stat counts in ticks of 10 ms)."""
    return sum(
        int((task / "schedstat").read_text().split()[0]) / 1e9 for task in Path(f"/proc/{pid}/task").iterdir()
    )


def resident_mb(pid: int) -> float:
    """Resident memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def binary_request(manifest: m.Manifest, inputs: dict[str, Array]) -> bytes:
    """A whole HTTP request with binary tensors that wants binary answers; sent in one piece."""
    tensors: list[dict[str, Any]] = [
        {
            "name": t.name,
            "shape": list(inputs[t.name].shape),
            "datatype": t.datatype,
            "parameters": {"binary_data_size": inputs[t.name].nbytes},
        }
        for t in manifest.inputs
    ]
    document = json.dumps({"inputs": tensors, "parameters": {"binary_data_output": True}}).encode()
    body = b"".join([document, *(inputs[t.name].tobytes() for t in manifest.inputs)])
    head = (
        f"POST /v2/models/{manifest.name}/infer HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Length: {len(body)}\r\nInference-Header-Content-Length: {len(document)}\r\n\r\n"
    )
    return head.encode() + body


def read_answer(connection: socket.socket) -> None:
    """Read one answer whole; ends the benchmark when it is a refusal."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += receive(connection)
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"\r\ncontent-length:", 1)[1].split(b"\r\n", 1)[0])
    while len(body) < length:
        body += receive(connection)
    if not head.startswith(b"HTTP/1.1 200 "):
        raise SystemExit(f"the model refuses its synthetic sample: {body!r}")


def receive(connection: socket.socket) -> bytes:
    """What has arrived. Raises ConnectionError at the end."""
    chunk = connection.recv(1 << 16)
    if not chunk:
        raise ConnectionResetError("closed")
    return chunk


if __name__ == "__main__":
    sys.exit(main())
