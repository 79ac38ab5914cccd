"""`edge-agent status`: the truth on this device, read from its disk and its inference process.

It needs no network and no running control process, and it changes nothing.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from edge_agent import files, sealed
from edge_agent.config import Config
from edge_agent.inference import InferenceClient, Loaded
from edge_agent.layout import MANIFEST, Layout
from edge_agent.update import journal
from edge_agent.update.clock import TOLERANCE_S, behind_text
from edge_agent.update.floor import metadata_floor, order_floor
from edge_agent.update.journal import Entry
from edge_agent.update.levels import behind_s
from edge_contract import canonical, manifest, wire
from edge_contract.errors import StorageFault, TransferFailed


def collect(config: Config) -> dict[str, Any]:
    """Everything `--json` prints."""
    layout = Layout(config)
    loaded, serving = _loaded(layout)
    names = _named(layout) | set(loaded)
    return {
        "device": config.device,
        "tenant": config.tenant,
        "control": _control_runs(layout),
        "serving": serving,
        "generation": _generation(layout),
        "clock_behind_s": round(behind_s(time.time(), metadata_floor(layout).value)),
        "models": [_model(layout, name, loaded.get(name)) for name in sorted(names)],
        "at_ms": time.time_ns() // 1_000_000,
    }


def text(status: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"{status['tenant']}/{status['device']}: control {_up(status['control'])}, "
        f"inference {_up(status['serving'])}, generation {status['generation']}"
    ]
    if status["clock_behind_s"] > TOLERANCE_S:
        lines.append(f"  {behind_text(status['clock_behind_s'])}")
    for m in status["models"]:
        serves = m["serves"]["version"] if m["serves"] else "nothing"
        if m["not_loaded"]:
            serves = f"nothing ({m['not_loaded']})"
        lines.append(f"  {m['name']}: serves {serves}, disk says {m['current'] or 'nothing'}, {m['state']}")
        if m["outcome"] != "none":
            lines.append(
                f"    last attempt: {m['target']} {m['outcome']} [{m['reason']}] {m['detail']}".rstrip()
            )
    if not status["control"] and not status["serving"]:
        lines.append(
            "  nothing runs here: start edge-inference.service and edge-agent.service, "
            "or `edge-agent up` where there is no systemd"
        )
    elif not status["models"]:
        lines.append("  no models: deploy one with `edge-fleet deploy`")
    return "\n".join(lines)


def _named(layout: Layout) -> set[str]:
    """Models with a link or a journal, as far as the disk says."""
    found: set[str] = set()
    with suppress(StorageFault):
        found |= set(journal.names(layout))
    with suppress(StorageFault):
        found |= {n for n in files.names(layout.models) if "current" in files.names(layout.models / n)}
    return found


def _up(flag: bool) -> str:
    return "up" if flag else "down"


def _loaded(layout: Layout) -> tuple[dict[str, Loaded], bool]:
    try:
        return {e.name: e for e in InferenceClient(layout.control_socket).index()}, True
    except TransferFailed:
        return {}, False


def _control_runs(layout: Layout) -> bool:
    if not layout.control_lock.exists():
        return False
    lock = files.try_lock(layout.control_lock)
    if lock is None:
        return True
    os.close(lock)
    return False


def _generation(layout: Layout) -> int:
    known = order_floor(layout).value.generation
    try:
        desired = sealed.read(layout.desired, wire.Desired)
    except (canonical.DecodeFault, StorageFault):
        return known
    return max(known, desired.generation) if desired else known


def _model(layout: Layout, name: str, loaded: Loaded | None) -> dict[str, Any]:
    entry = _entry(layout, name)
    ready = loaded is not None and loaded.ready
    return {
        "name": name,
        "serves": {"version": loaded.version, "digest": loaded.digest} if ready and loaded else None,
        "not_loaded": f"{loaded.detail} [{loaded.reason.value}]" if loaded and not ready else "",
        "current": _version(layout, layout.current(name)),
        "previous": _version(layout, layout.previous(name)),
        "state": entry.state.value,
        "target": entry.target.version if entry.target else None,
        "outcome": entry.outcome,
        "reason": entry.reason.value,
        "detail": entry.detail,
        "attempts": entry.attempts,
        "interruptions": entry.interruptions,
        "base": to_builtins(entry.base),
    }


def _entry(layout: Layout, name: str) -> Entry:
    try:
        return sealed.read(layout.journal_file(name), Entry) or Entry(schema=1, name=name)
    except canonical.DecodeFault as e:
        return Entry(schema=1, name=name, detail=f"its journal is damaged: {e}")
    except StorageFault as e:
        return Entry(schema=1, name=name, detail=f"its journal cannot be read: {e.what}")


def _version(layout: Layout, link: Path) -> str | None:
    """What a link leads to; `unreadable`, `missing` and `damaged` are told apart."""
    digest = None
    try:
        digest = files.link_target(link)
        data = files.read(layout.version(digest) / MANIFEST) if digest else None
    except StorageFault:
        return f"unreadable {digest[:12]}" if digest else "unreadable"
    if digest is None:
        return None
    if data is None:
        return f"missing {digest[:12]}"
    if canonical.sha256_hex(data) != digest:
        return f"damaged {digest[:12]}"
    return manifest.from_bytes(data).version
