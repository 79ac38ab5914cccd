"""Pure: what is known of a device, put together from its retained messages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import msgspec

from edge_contract import wire
from edge_contract.errors import MessageRejected

Status = Literal["online", "offline", "unknown"]


@dataclass(frozen=True, slots=True)
class Device:
    """One device as its messages describe it. `problem` names a message that could not be read."""

    tenant: str
    name: str
    status: Status
    since_ms: int | None
    birth: wire.Birth | None
    state: wire.State | None
    problem: str = ""


def filters(tenant: str) -> list[str]:
    """What to subscribe to, to know every device of a tenant."""
    topics = wire.Topics(tenant, "+")
    return [topics.presence, topics.birth, topics.state]


def is_stale(will: wire.Presence, newest_session: int) -> bool:
    """Whether an `offline` is the late death of a session that the device has replaced."""
    return will.status == "offline" and will.session < newest_session


def presence_of(presence: wire.Presence | None, birth: wire.Birth | None) -> tuple[Status, int | None]:
    """Online or not, and since when (Unix ms). A will older than the birth is ignored."""
    if presence is None:
        return "unknown", None if birth is None else birth.at_ms
    if birth is not None and is_stale(presence, birth.session):
        return "online", birth.at_ms
    return presence.status, presence.at_ms


def gather(tenant: str, messages: Iterable[tuple[str, bytes]]) -> list[Device]:
    """Devices, by name, from (topic, payload) of presence, birth and state messages."""
    found: dict[str, dict[str, bytes]] = {}
    for topic, payload in messages:
        parts = wire.split_topic(topic)
        if parts is not None and parts[0] == tenant and payload:
            found.setdefault(parts[1], {})[parts[2]] = payload
    return [_device(tenant, name, kinds) for name, kinds in sorted(found.items())]


def to_plain(device: Device) -> dict[str, object]:
    """For `--json`."""
    birth, state = device.birth, device.state
    return {
        "tenant": device.tenant,
        "device": device.name,
        "status": device.status,
        "online": device.status == "online",
        "since_ms": device.since_ms,
        "session": None if birth is None else birth.session,
        "facts": None if birth is None else msgspec.to_builtins(birth.facts),
        "serving": state is not None and state.serving,
        "refused": "" if state is None else state.refused,
        "state": None if state is None else msgspec.to_builtins(state),
        "problem": device.problem,
    }


def _device(tenant: str, name: str, kinds: dict[str, bytes]) -> Device:
    problems: list[str] = []
    presence = _decoded(kinds.get("up/presence"), wire.Presence, problems)
    birth = _decoded(kinds.get("up/birth"), wire.Birth, problems)
    state = _decoded(kinds.get("up/state"), wire.State, problems)
    status, since_ms = presence_of(presence, birth)
    return Device(tenant, name, status, since_ms, birth, state, "; ".join(problems))


def _decoded(data: bytes | None, kind: type[wire.T], problems: list[str]) -> wire.T | None:
    if data is None:
        return None
    try:
        return wire.decode(data, kind)
    except MessageRejected as e:
        problems.append(e.what)
        return None
