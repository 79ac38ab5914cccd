"""What the device's own sensors say: CPU, memory, temperature, disk, network. None where there is none."""

from __future__ import annotations

from pathlib import Path

import psutil

METRICS = (
    "cpu_percent",
    "load_1m",
    "memory_percent",
    "memory_available_bytes",
    "temperature_c",
    "disk_percent",
    "disk_free_bytes",
    "net_sent_bytes_per_s",
    "net_received_bytes_per_s",
    "uptime_s",
)


class Sensors:
    """Rates need two looks; the first sample of a rate is None."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._net: tuple[int, int, int] | None = None
        psutil.cpu_percent(interval=None)

    def sample(self, now_ms: int) -> dict[str, float | None]:
        """One value per name of METRICS."""
        memory = psutil.virtual_memory()
        disk_percent, disk_free_bytes = _disk(self._folder)
        sent, received = self._network(now_ms)
        return {
            "cpu_percent": psutil.cpu_percent(interval=None),
            "load_1m": psutil.getloadavg()[0],
            "memory_percent": memory.percent,
            "memory_available_bytes": float(memory.available),
            "temperature_c": _temperature(),
            "disk_percent": disk_percent,
            "disk_free_bytes": disk_free_bytes,
            "net_sent_bytes_per_s": sent,
            "net_received_bytes_per_s": received,
            "uptime_s": now_ms / 1000 - psutil.boot_time(),
        }

    def _network(self, now_ms: int) -> tuple[float | None, float | None]:
        counters = psutil.net_io_counters()
        if counters is None:
            return None, None
        before, self._net = self._net, (now_ms, counters.bytes_sent, counters.bytes_recv)
        if before is None or now_ms <= before[0]:
            return None, None
        seconds = (now_ms - before[0]) / 1000
        return (
            max(0, counters.bytes_sent - before[1]) / seconds,
            max(0, counters.bytes_recv - before[2]) / seconds,
        )


def _disk(folder: Path) -> tuple[float | None, float | None]:
    """(percent used, bytes free); None while the disk does not say."""
    try:
        disk = psutil.disk_usage(str(folder))
    except OSError:  # a disk out of order: the outbox and the updates report it
        return None, None
    return disk.percent, float(disk.free)


def _temperature() -> float | None:
    """The hottest sensor, which is what throttles the CPU."""
    readings = [entry.current for group in psutil.sensors_temperatures().values() for entry in group]
    return max(readings) if readings else None
