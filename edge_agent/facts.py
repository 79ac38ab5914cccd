"""What this machine is: architecture, CPU, instruction sets, memory, installed runtimes.

It reads /proc and package metadata; it imports no runtime, so the control process may use it.
"""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import psutil

from edge_contract.console import distribution_version
from edge_contract.encodings import LANES, ZSTD, ZSTD_PATCH
from edge_contract.profile import Facts

# Distribution → the runtime's name in manifests. Both TFLite packages serve the same models.
_RUNTIMES = {"onnxruntime": "onnxruntime", "ai-edge-litert": "tflite", "tflite-runtime": "tflite"}

# Zstandard is built in from 3.14 on, where the build has it, and a wheel before.
_ZSTD = "_zstd" if sys.version_info >= (3, 14) else "backports.zstd"
# Algorithm → modules that its decoder needs. Looked for, not imported: only the decode child does that.
_DECODERS = {LANES: ("_bz2", "_lzma"), ZSTD: (_ZSTD,), ZSTD_PATCH: (_ZSTD, "mmap")}


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
        encodings=encodings(),
    )


def encodings() -> list[str]:
    """Algorithms that this Python can decode. Some builds of it lack bz2 or xz, some machines a wheel."""
    return sorted(name for name, needed in _DECODERS.items() if all(map(_is_there, needed)))


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package it would be in
        return False


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
