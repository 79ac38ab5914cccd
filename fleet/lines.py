"""Pure: what `edge-fleet watch` shows, as a line for people or an object for programs."""

from __future__ import annotations

from typing import Any

import msgspec

from edge_contract import canonical, wire
from fleet.inventory import Progress
from fleet.render import at, clean, size
from fleet.watch import Doubled, Item, Seen, Turned, Unreadable
from fleet.watermark import Gap


def to_line(item: Item, now_ms: int) -> str:
    """One line without control characters."""
    if isinstance(item, Seen):
        return clean(f"{_time(item, now_ms)} {item.device} {_payload(item.record)}")
    if isinstance(item, Turned):
        return clean(
            f"{at(now_ms)} {item.device} is {item.presence.status} (session {item.presence.session})"
        )
    if isinstance(item, Doubled):
        return clean(
            f"{at(now_ms)} {item.device} came online with session {item.presence.session}, which is not newer"
            " than its last: two devices may have this id"
        )
    if isinstance(item, Unreadable):
        return clean(f"{at(now_ms)} {item.device} sent something unreadable: {item.problem}")
    return "\n".join(
        f"{at(now_ms)} {item.stream.device} {item.stream.stream} rows {gap.first} to {gap.last} {_why(gap)}"
        for gap in item.gaps
    )


def to_plain(item: Item) -> list[dict[str, Any]]:
    """JSON objects, each with a `type`."""
    if isinstance(item, Seen):
        r = item.record
        key = {"device": item.device, "stream": r.stream, "epoch": r.epoch, "seq": r.seq}
        return [{"type": "record", **key, "lost": r.lost, "payload": r.payload}]
    if isinstance(item, Turned):
        return [{"type": "presence", "device": item.device, **msgspec.to_builtins(item.presence)}]
    if isinstance(item, Doubled):
        return [{"type": "doubled", "device": item.device, **msgspec.to_builtins(item.presence)}]
    if isinstance(item, Unreadable):
        return [{"type": "unreadable", "device": item.device, "problem": item.problem}]
    return [_gap(item, index) for index in range(len(item.gaps))]


def _why(gap: Gap) -> str:
    if gap.elsewhere:
        return "are not in this database: the device had them acknowledged before, elsewhere"
    return "are lost: the device had no room for them" if gap.explained else "have not come (unexplained)"


def _gap(progress: Progress, index: int) -> dict[str, Any]:
    gap = progress.gaps[index]
    key = progress.stream
    head = {"type": "gap", "device": key.device, "stream": key.stream, "epoch": key.epoch}
    return {**head, **gap._asdict()}


def _time(item: Seen, now_ms: int) -> str:
    at_ms = item.record.payload.get("at_ms")
    return at(at_ms if isinstance(at_ms, int) and 0 <= at_ms < 1 << 43 else now_ms)


def _payload(record: wire.Record) -> str:
    try:
        if record.stream == "event":
            return _event(canonical.from_builtins(record.payload, wire.Event))
        return _telemetry(canonical.from_builtins(record.payload, wire.Telemetry))
    except canonical.DecodeFault:
        # Of a newer version: stored and acknowledged as it is, and shown as it is.
        return f"{record.stream} {record.payload}"


def _event(event: wire.Event) -> str:
    subject = f" {event.model}@{event.version}" if event.version else f" {event.model}" if event.model else ""
    reason = "" if event.reason.value == "ok" else f" [{event.reason.value}]"
    return f"event {event.kind}{subject}{reason} {event.detail}".rstrip()


def _telemetry(telemetry: wire.Telemetry) -> str:
    device = " ".join(_metric(key, value) for key, value in telemetry.device.items() if value is not None)
    models = "".join(
        f" | {m.name}@{m.version} {m.rate_per_s:.4g}/s {m.errors} errors"
        f"{'' if m.p95_ms is None else f' p95 {m.p95_ms:.4g} ms'}"
        for m in telemetry.models
    )
    return f"telemetry {device}{models}"


def _metric(key: str, value: float) -> str:
    """`disk_free_bytes` 8.1e10 → `disk_free=75.2 GiB`; the unit is in the name's last part."""
    for suffix, unit in (("_bytes_per_s", "/s"), ("_bytes", "")):
        if key.endswith(suffix):
            return f"{key.removesuffix(suffix)}={size(round(value))}{unit}"
    for suffix, unit in (("_percent", " %"), ("_c", " °C"), ("_s", " s")):
        if key.endswith(suffix):
            return f"{key.removesuffix(suffix)}={value:.0f}{unit}"
    return f"{key}={value:.3g}"
