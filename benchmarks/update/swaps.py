"""Swaps of a model under load: failed requests, and latency while one is under way against latency without.

`python benchmarks/update/swaps.py [--swaps 100] [--requests 100000] [--clients 2] [--json]`. Two versions of
a 5 MB model with their prepared forms lie in the store of a real `edge-agent serve`. Clients in processes of
their own ask without a pause, first with nothing else going on, then while the control socket loads the two
versions in turn. A request counts as during a swap when it overlaps the time from a load's begin to 100 ms
after its end, in which the old version is let go. Exits 1 if a request failed.

Only ratios mean something on a machine that does other work. `benchmarks/swaps_under_load.py` goes the whole
way, with signatures, downloads, preflight and probation.
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from pathlib import Path

import numpy as np

from edge_agent.config import load
from edge_agent.inference import InferenceClient
from edge_agent.layout import Layout
from edge_agent.serving import package

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from activation import NAME, install, net, prepare, wait_ready
from serving_footprint import binary_request, read_answer

AFTER_S = 0.1
PAUSE_S = 0.15
# Asks until its input ends; then writes when each request began and ended, seconds of the monotonic clock.
CLIENT = "--ask"


def main() -> int:
    """Measure and print."""
    if CLIENT in sys.argv:
        return _ask(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--swaps", type=int, default=100, help="how many swaps at least (default 100)")
    parser.add_argument("--requests", type=int, default=100_000, help="how many requests at least")
    parser.add_argument("--clients", type=int, default=2, help="how many clients (default 2)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ew-") as name:
        figures = _measure(Path(name), options.swaps, options.requests, options.clients)
    if options.json:
        print(json.dumps(figures))
    else:
        _print(figures)
    return 1 if figures["failed"] else 0


def _print(f: dict[str, float]) -> None:
    print(f"{f['swaps']:.0f} swaps, {f['requests']:.0f} requests, {f['failed']:.0f} failed")
    print(f"{'latency, ms':16}{'p50':>8}{'p99':>8}{'longest':>9}")
    for phase in ("steady", "between", "during"):
        row = (f[f"{phase}_{key}"] for key in ("p50_ms", "p99_ms", "max_ms"))
        print(f"{phase + ' swaps' if phase != 'steady' else phase:16}" + "{:8.2f}{:8.2f}{:9.1f}".format(*row))
    print(
        f"p99 during swaps is {f['p99_ratio']:.2f} times the steady p99; a swap takes {f['swap_ms']:.1f} ms"
    )


def _measure(folder: Path, swaps: int, requests: int, clients: int) -> dict[str, float]:
    config_path = folder / "agent.toml"
    config_path.write_text(
        f'tenant = "bench"\ndevice = "box"\nstate_dir = "{folder}/state"\nrun_dir = "{folder}/run"\n'
        '[serving]\ntcp = "127.0.0.1:0"\n'
    )
    layout = Layout(load(config_path))
    small = {"channels": (8, 16, 32), "widths": (1024, 1024, 10)}
    digests = [install(layout, "1", net(**small)), install(layout, "2", net(**small, seed=1))]
    for digest in digests:
        prepare(layout, digest)
    link = layout.current(NAME)
    link.parent.mkdir(parents=True)
    link.symlink_to(layout.version(digests[0]))
    layout.run.mkdir()
    command = [sys.executable, "-m", "edge_agent", "serve", "--config", str(config_path)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        client = InferenceClient(layout.control_socket)
        wait_ready(client)
        asking = _Clients(layout, digests[0], folder, clients)
        time.sleep(1)
        steady_from_s = time.monotonic()
        time.sleep(8)
        steady_to_s = time.monotonic()
        windows = []
        while len(windows) < swaps or asking.count() < requests:
            begun_s = time.monotonic()
            client.load(NAME, digests[(len(windows) + 1) % 2], 60.0)
            windows.append((begun_s, time.monotonic()))
            time.sleep(PAUSE_S)
        times, failed = asking.end()
    finally:
        server.terminate()
        server.wait(timeout=60)
    steady = [t for t in times if steady_from_s <= t[0] and t[1] <= steady_to_s]
    swapping = [t for t in times if t[0] >= steady_to_s]
    during = [t for t in swapping if _overlaps(t, windows)]
    between = [t for t in swapping if not _overlaps(t, windows)]
    figures = {
        "swaps": len(windows),
        "requests": len(times) + failed,
        "failed": failed,
        "swap_ms": float(np.median([b - a for a, b in windows])) * 1000,
    }
    for name, found in (("steady", steady), ("between", between), ("during", during)):
        took_ms = np.array([b - a for a, b in found]) * 1000
        figures |= {f"{name}_{k}": float(v) for k, v in _quantiles(took_ms).items()}
    return figures | {"p99_ratio": figures["during_p99_ms"] / figures["steady_p99_ms"]}


def _quantiles(took_ms: np.ndarray) -> dict[str, float]:
    p50, p99 = np.percentile(took_ms, [50, 99])
    return {"p50_ms": p50, "p99_ms": p99, "max_ms": took_ms.max()}


def _overlaps(request: tuple[float, float], windows: list[tuple[float, float]]) -> bool:
    last = bisect_right(windows, (request[1],)) - 1
    return last >= 0 and request[0] <= windows[last][1] + AFTER_S


class _Clients:
    """Processes that ask; each writes its count now and then, and all times in the end."""

    def __init__(self, layout: Layout, digest: str, folder: Path, clients: int) -> None:
        self._files = [folder / f"times-{i}" for i in range(clients)]
        command = [
            sys.executable,
            __file__,
            CLIENT,
            str(layout.version(digest)),
            str(layout.inference_socket),
        ]
        self._processes = [
            subprocess.Popen([*command, str(file)], stdin=subprocess.PIPE) for file in self._files
        ]

    def count(self) -> int:
        """Requests answered so far, as last written."""
        return sum(int(f.read_text() or 0) for f in self._files if f.exists())

    def end(self) -> tuple[list[tuple[float, float]], int]:
        """All times, and how many requests failed."""
        times, failed = [], 0
        for process, file in zip(self._processes, self._files, strict=True):
            process.communicate(timeout=60)
            lines = file.read_text().splitlines()
            failed += int(lines[0])
            times += [(float(a), float(b)) for a, b in (line.split() for line in lines[1:])]
        return sorted(times), failed


def _ask(version: Path, path: Path, out: Path) -> int:
    """One client: the golden samples in turn, on one connection, made anew when a request fails."""
    stored = package.read(version)
    x = np.load(stored.golden)["input:x"]
    requests = [binary_request(stored.manifest, {"x": x[i : i + 1]}) for i in range(len(x))]
    times: list[tuple[float, float]] = []
    failed = 0
    connection = _connect(path)
    stdin = sys.stdin.fileno()
    while not select.select([stdin], [], [], 0)[0]:
        for request in requests * 25:
            begun_s = time.monotonic()
            try:
                connection.sendall(request)
                read_answer(connection)
                times.append((begun_s, time.monotonic()))
            except (OSError, SystemExit):
                failed += 1
                connection = _connect(path)
        out.with_suffix(".new").write_text(str(len(times)))
        out.with_suffix(".new").replace(out)
    out.write_text("\n".join([str(failed), *(f"{a} {b}" for a, b in times)]))
    return 0


def _connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(30)
    connection.connect(str(path))
    return connection


if __name__ == "__main__":
    sys.exit(main())
