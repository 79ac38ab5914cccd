"""A stand-in for `edge-agent bench --json`: the same arguments and the same document, figures as told.

Run as a program. It loads nothing. FIGURES, a JSON file named by the first argument, gives for each
candidate's file stem `ratio`, `p50_ms`, `p95_ms`, `peak_rss_bytes`, or `failed: true`; `machine` overrides
facts; `exit` ends it with that status instead of a report.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

MACHINE = {
    "architecture": "x86_64",
    "cpu": "double",
    "isa": ["avx2"],
    "cores": 2,
    "memory_bytes": 1 << 33,
    "os": "test",
    "python": "3.11",
    "agent_version": "0",
    "runtimes": {"onnxruntime": "1.18"},
}


def main(argv: list[str]) -> int:
    told = json.loads(Path(argv[0]).read_text())
    arguments = _parse(argv[1:])
    if "exit" in told:
        print("it broke", file=sys.stderr)
        return int(told["exit"])
    report = {
        "schema": 1,
        "machine": {**MACHINE, **told.get("machine", {})},
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "reference_ms": 1.0,
        "results": [_result(Path(m), told.get(Path(m).stem, {})) for m in arguments.models],
    }
    print(json.dumps(report))
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["bench"])
    parser.add_argument("--json", action="store_true", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--round-s", type=float, required=True)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("models", nargs="+")
    arguments = parser.parse_args(argv)
    if not arguments.inputs.is_file():
        raise FileNotFoundError(arguments.inputs)
    return arguments


def _result(model: Path, told: dict[str, Any]) -> dict[str, Any]:
    if told.get("failed"):
        return {
            "type": "failed",
            "model": str(model),
            "reason": "load_failed",
            "what": "no kernel for it",
            "next_step": "none",
        }
    data = model.read_bytes()
    ratio = told.get("ratio", 1.0)
    return {
        "type": "measured",
        "model": str(model),
        "sha256": hashlib.sha256(data).hexdigest(),
        "size_bytes": len(data),
        "load_ms": 5.0,
        "peak_rss_bytes": told.get("peak_rss_bytes", 60_000_000),
        "p50_ms": told.get("p50_ms", ratio),
        "p95_ms": told.get("p95_ms", ratio * 1.2),
        "cpu_ms": ratio,
        "ratio": ratio,
        "iterations": 100,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
