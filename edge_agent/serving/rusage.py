"""What this process has used, from the kernel's own counts."""

from __future__ import annotations

import os
from pathlib import Path


def resident_bytes() -> int:
    """Resident memory now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def forget_peak() -> bool:
    """Let the peak begin anew at what is resident now; False where the kernel does not do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_resident_bytes() -> int:
    """The most it has been since the program started, or since `forget_peak`.

    Not getrusage's: that one is inherited through exec, so a child of a large parent reports the parent's.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status has no VmHWM")


def available_bytes() -> int:
    """What the kernel can give to a new program now without swapping, on the whole machine."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def private_bytes() -> int:
    """Memory that is this process's alone and not of a file: what a leak makes grow, in memory or in swap."""
    total = 0
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(("RssAnon:", "VmSwap:")):
            total += int(line.split()[1]) << 10
    return total
