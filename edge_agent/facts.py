"""What this machine is: architecture, CPU, instruction sets, memory, installed runtimes.

It reads /proc and package metadata; it imports no runtime, so the control process may use it.
"""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import psutil

from edge_contract.console import distribution_version
from edge_contract.profile import Facts

# Distribution → the runtime's name in manifests. Both TFLite packages serve the same models.
_RUNTIMES = {"onnxruntime": "onnxruntime", "ai-edge-litert": "tflite", "tflite-runtime": "tflite"}


def probe(cpuinfo: Path = Path("/proc/cpuinfo")) -> Facts:
    """The facts of this machine."""
    cpu, isa = processor(cpuinfo)
    return Facts(
        architecture=platform.machine(),
        cpu=cpu,
        isa=isa,
        cores=psutil.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        os=platform.platform(terse=True),
        python=platform.python_version(),
        agent_version=distribution_version(),
        runtimes=_runtimes(),
    )


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, list[str]]:
    """Name and instruction sets of the CPU alone: what kernels a runtime picks depends on."""
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    architecture = platform.machine()
    name = _field(text, "model name", "Model", "CPU part") or architecture
    return name, instruction_sets(text, architecture)


def instruction_sets(cpuinfo: str, architecture: str) -> list[str]:
    """The kernel's flag names, sorted; aarch64 always has NEON, which its kernel calls asimd."""
    flags = set((_field(cpuinfo, "flags", "Features") or "").split())
    if "asimd" in flags or architecture == "aarch64":
        flags.add("neon")
    return sorted(flags)


def _field(cpuinfo: str, *names: str) -> str | None:
    values: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            values.setdefault(key.strip(), value.strip())
    return next((values[name] for name in names if name in values), None)


def _runtimes() -> dict[str, str]:
    found: dict[str, str] = {}
    for distribution, runtime in _RUNTIMES.items():
        try:
            found.setdefault(runtime, metadata.version(distribution))
        except metadata.PackageNotFoundError:
            continue
    return found
