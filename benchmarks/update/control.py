"""Memory of the control process: idle, and after it has brought an update home.

`python benchmarks/update/control.py [--seconds 10] [--json]`. It sets up what the demo sets up (optimized
nets, registry, broker, `edge-agent up`), watches the control process before the first deployment, then
installs a version and updates it. Resident and private memory in MB; CPU as a share of one core while idle.
What parses downloads lives in children, so an update should leave little behind.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import psutil
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "fashion_mnist"))

from demo import HERE, Demo


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to watch it idle (default 10)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ew-") as name:
        figures = _measure(Path(name), options.seconds)
    if options.json:
        print(json.dumps(figures))
        return 0
    print(f"{'control process':24}{'resident MB':>12}{'private MB':>12}{'CPU idle':>10}")
    for label, f in figures.items():
        print(f"{label:24}{f['rss_mb']:12.1f}{f['private_mb']:12.1f}{f['cpu_share']:10.2%}")
    return 0


def _measure(work: Path, seconds: float) -> dict[str, dict[str, float]]:
    demo = Demo(work, Console(stderr=True), probation_s=1.0, probation_min_requests=0)
    try:
        demo.optimize(HERE / "mobilenet.onnx", demo.local_profile(), 1)
        demo.publish_first()
        demo.start_device()
        control = _control(work)
        found = {"idle, nothing deployed": _watch(control, seconds)}
        demo.deploy_first()
        demo.optimize(HERE / "resnet8.onnx", demo.local_profile(), 2)
        demo.publish(demo.bundle("resnet8", demo.local_profile()))
        demo.deploy("2")
        found["after an update"] = _watch(control, seconds)
        return found
    finally:
        demo.processes.end()
        shutil.rmtree(demo.run_dir, ignore_errors=True)


def _control(work: Path) -> psutil.Process:
    """`edge-agent run` of this demo, by its command line."""
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "run" in line and any(str(work) in part for part in line):
            return process
    raise SystemExit("there is no control process")


def _watch(process: psutil.Process, seconds: float) -> dict[str, float]:
    time.sleep(4)  # imports, connection, the first look at the registry
    before, started_s = sum(process.cpu_times()[:2]), time.monotonic()
    time.sleep(seconds)
    memory = process.memory_full_info()
    used_s = sum(process.cpu_times()[:2]) - before
    return {
        "rss_mb": memory.rss / 1e6,
        "private_mb": memory.uss / 1e6,
        "cpu_share": used_s / (time.monotonic() - started_s),
    }


if __name__ == "__main__":
    sys.exit(main())
