"""Swaps in a row under continuous load, the whole way: signed, deployed, preflighted, activated, committed.

`python benchmarks/swaps_under_load.py [--swaps 20] [--clients 4] [--json]`. It sets up what the demo sets up
(optimized nets, registry, broker, device), then deploys two versions in turn while clients keep asking, and
counts failed requests. Exits 1 if there was one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "fashion_mnist"))

from demo import HERE, MODEL, Demo
from demo_tools import Load


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--swaps", type=int, default=20, help="how many swaps (default 20)")
    parser.add_argument("--clients", type=int, default=4, help="how many clients (default 4)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ew-") as name:
        figures = _measure(Path(name), options.swaps, options.clients)
    if options.json:
        print(json.dumps(figures))
    else:
        print(
            f"{figures['swaps']} swaps in a row, {options.clients} clients: {figures['failed']} of "
            f"{figures['requests']} requests failed; latency p50 {figures['p50_ms']:.2f} ms, "
            f"p99 {figures['p99_ms']:.2f} ms, longest {figures['max_ms']:.0f} ms"
        )
    return 1 if figures["failed"] else 0


def _measure(work: Path, swaps: int, clients: int) -> dict[str, float]:
    demo = Demo(work, Console(stderr=True), probation_s=1.0, probation_min_requests=30)
    try:
        demo.optimize(HERE / "mobilenet.onnx", demo.local_profile(), 1)
        demo.publish_first()
        demo.start_device()
        demo.deploy_first()
        demo.optimize(HERE / "resnet8.onnx", demo.local_profile(), 2)
        demo.publish(demo.bundle("resnet8", demo.local_profile()))
        with Load(demo.http_port, MODEL, demo.images, demo.labels, clients=clients) as load:
            for turn in range(swaps):
                demo.deploy("2" if turn % 2 == 0 else "1", downgrade=turn % 2 == 1)
        p50, p99 = np.percentile(load.latencies_ms, [50, 99])
        return {
            "swaps": swaps,
            "requests": load.answered + len(load.failures),
            "failed": len(load.failures),
            "p50_ms": float(p50),
            "p99_ms": float(p99),
            "max_ms": max(load.latencies_ms),
        }
    finally:
        demo.processes.end()
        shutil.rmtree(demo.run_dir, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
