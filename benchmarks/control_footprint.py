"""Memory and CPU of an idle control process: connected to a broker, sampling, nothing to update.

`python benchmarks/control_footprint.py [--seconds 20] [--json]`. Resident and private memory in MB, CPU as a
share of one core. It starts an embedded broker and `edge-agent run` and ends both.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
CONFIG = """\
tenant = "bench"
device = "box"
state_dir = "{folder}/state"
run_dir = "{folder}/run"
[broker]
port = {port}
[registry]
root = "{folder}/root.json"
[telemetry]
interval_s = 5.0
"""


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to watch it (default 20)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ew-") as name, socket.socket() as probe:
        folder = Path(name)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        (folder / "agent.toml").write_text(CONFIG.format(folder=folder, port=port))
        broker = _start("edge-fleet", "broker", "--port", str(port))
        agent = _start("edge-agent", "run", "--config", str(folder / "agent.toml"))
        try:
            figures = _watch(agent.pid, options.seconds)
        finally:
            for process in (agent, broker):
                process.terminate()
                process.wait(timeout=20)
    if options.json:
        print(json.dumps(figures))
    else:
        print(
            f"control process, idle: {figures['rss_mb']:.1f} MB resident, {figures['uss_mb']:.1f} MB of it "
            f"private, {figures['cpu_share']:.2%} of a core over {options.seconds:.0f} s"
        )
    return 0


def _start(*command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [str(BIN / command[0]), *command[1:]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def _watch(pid: int, seconds: float) -> dict[str, float]:
    time.sleep(4)  # imports, connection, the first look at the registry
    process = psutil.Process(pid)
    before, started_s = sum(process.cpu_times()[:2]), time.monotonic()
    time.sleep(seconds)
    memory = process.memory_full_info()
    used_s = sum(process.cpu_times()[:2]) - before
    return {
        "rss_mb": memory.rss / 1e6,
        "uss_mb": memory.uss / 1e6,
        "cpu_share": used_s / (time.monotonic() - started_s),
    }


if __name__ == "__main__":
    sys.exit(main())
