"""How things look to people: tables and lines. Values come in finished; nothing is decided here.

What devices send is shown as text, never as markup or terminal codes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from edge_contract import wire
from edge_contract.errors import Reason
from edge_contract.manifest import Manifest
from fleet.driver import Row
from fleet.registry.inspection import RoleView
from fleet.registry.reader import Published
from fleet.rollout import Ended, Underway
from fleet.roster import Device

# Without a terminal nothing needs to fit one.
_PIPE_WIDTH = 240
_STYLES = {
    "committed": "green",
    "online": "green",
    "offline": "red",
    "failed": "red",
    "reverted": "red",
    "refused": "red",
    "no_state": "red",
    "no_answer": "yellow",
}


def print_table(table: Table, out: IO[str] | None = None) -> None:
    """On standard output unless told otherwise."""
    _console(out or sys.stdout).print(table)


def registry_table(published: Sequence[Published]) -> Table:
    """Models and versions, who answers for them, and what was measured of them."""
    columns = ("Model", "Version", "Release", "Size", "Manifest", "Team", "Approved by", "Recipe", "Profile")
    table = _table(*columns, "Metrics")
    for entry in published:
        m = entry.manifest
        table.add_row(
            m.name,
            m.version,
            str(m.release),
            size(m.size_bytes),
            entry.sha256[:12],
            entry.team or "",
            clean(", ".join(entry.approved_by)),
            m.lineage.recipe,
            m.lineage.profile,
            metrics(m),
        )
    return table


def keys_table(roles: Sequence[RoleView]) -> Table:
    """Roles, how many keys each takes, and the keys."""
    table = _table("Role", "Needs", "Keys", "Version", "Expires (UTC)", "Files")
    for role in roles:
        table.add_row(
            role.role + "".join(f"\n  {pattern}" for pattern in role.models),
            f"{role.threshold} of {len(role.keys)}" + "\nunfinished" * role.unfinished,
            "\n".join(f"{key.keyid[:12]} {key.kind} {clean(key.label)}".rstrip() for key in role.keys),
            str(role.version or ""),
            f"{role.expires:%Y-%m-%d %H:%M}" if role.expires else "",
            "\n".join(key.file or "" for key in role.keys),
        )
    return table


def devices_table(devices: Sequence[Device], now_ms: int) -> Table:
    """One line a device."""
    table = _table("Device", "Status", "Since", "Arch", "Cores", "Memory", "Agent", "Models", "Remarks")
    for device in devices:
        facts = None if device.birth is None else device.birth.facts
        table.add_row(
            clean(device.name),
            _styled(device.status),
            "?" if device.since_ms is None else ago(now_ms - device.since_ms),
            "?" if facts is None else clean(facts.architecture),
            "?" if facts is None else str(facts.cores),
            "?" if facts is None else size(facts.memory_bytes),
            "?" if facts is None else clean(facts.agent_version),
            Text(models(device.state)),
            Text(clean(device.problem or ("" if device.state is None else device.state.refused))),
        )
    return table


def deployment_table(rows: Sequence[Row]) -> Table:
    """One line a device: where it is, how far, and why it ended."""
    table = _table("Device", "Presence", "Serves", "Generation", "State", "Progress", "Seconds", "Why")
    for row in rows:
        view = row.view
        word = view.outcome if isinstance(view, Ended) else view.state
        table.add_row(
            row.device,
            _styled(row.presence),
            row.version or "–",
            str(row.generation or "–"),
            _styled(word),
            _bar(view),
            f"{row.seconds:.1f}",
            Text(why(view)),
        )
    return table


class PlainProgress:
    """A line for each change, for logs and pipes."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._said: dict[str, str] = {}

    def show(self, rows: Sequence[Row]) -> None:
        """Print what changed since the last time."""
        for row in rows:
            view = row.view
            line = f"{view.outcome if isinstance(view, Ended) else view.state} {why(view)}".rstrip()
            if self._said.get(row.device) != line:
                self._said[row.device] = line
                print(f"{row.device} {row.seconds:.1f} s: {line}", file=self._out, flush=True)


class LiveProgress:
    """A table that is drawn anew in place, for terminals."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def show(self, rows: Sequence[Row]) -> None:
        """Draw the rows as they are now."""
        self._live.update(deployment_table(rows))


@contextmanager
def progress(*, as_json: bool) -> Iterator[PlainProgress | LiveProgress]:
    """Live on a terminal, lines elsewhere; on standard error where JSON owns standard output."""
    out = sys.stderr if as_json else sys.stdout
    if not out.isatty():
        yield PlainProgress(out)
        return
    with Live(console=_console(out), refresh_per_second=4) as live:
        yield LiveProgress(live)


def result(device: str, answer: wire.Result) -> str:
    """A command's answer: one line, and its data below it."""
    if not answer.ok:
        return clean(f"{device}: {answer.what} [{answer.reason.value}] → {answer.next_step}")
    data = json.dumps(_short(answer.data), indent=2) if answer.data else ""
    return f"{device}: {clean(answer.what)}\n{data}".rstrip()


def _short(value: Any) -> Any:
    """Lists of words on one line: a CPU's flags would fill a screen."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return [_short(item) for item in value] if isinstance(value, list) else value


def models(state: wire.State | None) -> str:
    """What serves, and what is being tried or was thrown out."""
    if state is None:
        return "?"
    return ", ".join(_model(m) for m in state.models) or "none"


def metrics(manifest: Manifest) -> str:
    """Scores as published, the chosen candidate's beside FP32's."""
    return ", ".join(
        f"{m.name} {m.value:.4g} ({m.split}, fp32 {m.fp32_value:.4g})" for m in manifest.lineage.metrics
    )


def why(view: Underway | Ended) -> str:
    """Reason code and detail, if there is something to say."""
    code = "" if view.reason.value == "ok" else f"[{view.reason.value}] "
    return clean(code + view.detail)


def size(count_bytes: int) -> str:
    """Bytes for people, in powers of 1024."""
    value = float(count_bytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def ago(span_ms: int) -> str:
    """A span for people, in its largest unit; a device's clock may be ahead of ours."""
    seconds = max(0, span_ms) // 1000
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} s ago"


def at(time_ms: int) -> str:
    """Local wall-clock time of a Unix time in milliseconds."""
    return datetime.fromtimestamp(time_ms / 1000).astimezone().strftime("%H:%M:%S")


def clean(text: str) -> str:
    """Text from elsewhere without control characters, on one line."""
    return "".join(ch if ch.isprintable() else " " for ch in text)


def _model(model: wire.ModelState) -> str:
    text = f"{model.name}@{model.version or '–'}"
    if model.state != "idle":
        return f"{text} ({model.state} {model.target_version or ''})"
    if model.outcome in ("failed", "reverted"):
        return f"{text} ({model.target_version} {model.outcome}: {model.reason.value})"
    return text if model.reason is Reason.OK else f"{text} ({model.reason.value})"


def _bar(view: Underway | Ended) -> str:
    if isinstance(view, Ended) or view.progress <= 0:
        return ""
    filled = round(view.progress * 10)
    return f"{'█' * filled}{'░' * (10 - filled)} {view.progress:.0%}"


def _styled(word: str) -> Text:
    return Text(word.replace("_", " "), style=_STYLES.get(word, ""))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _console(out: IO[str]) -> Console:
    return Console(file=out, highlight=False, markup=False, width=None if out.isatty() else _PIPE_WIDTH)
