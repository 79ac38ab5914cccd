"""One deployment: read the devices' reports, sign and send, follow until each has ended. Effects only.

What to ask and how to read the answers is decided in rollout.py; how it looks, in render.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_contract import canonical, dsse, wire
from edge_contract.errors import MessageRejected, Reason
from fleet.bus import Bus, Message
from fleet.registry.keys import signing_keys
from fleet.rollout import Ended, Goal, Underway, judge, next_desired

_STATE_WAIT_S = 5.0
# The other retained messages of a device come with its state; this is for the last of them.
_SETTLE_S = 0.3
_TICK_S = 0.1


@dataclass(frozen=True, slots=True)
class Order:
    """What to deploy, where, and how long to wait."""

    model: wire.DesiredModel
    tenant: str
    devices: Sequence[str]
    timeout_s: float
    expires_s: int


@dataclass(slots=True)
class Row:
    """What is known of one device now. Changed by the deployment, read by whoever shows it."""

    device: str
    view: Underway | Ended
    presence: str = "unknown"
    version: str | None = None
    generation: int = 0
    seconds: float = 0.0


class Deployment:
    """Construct, then `run` once."""

    def __init__(
        self, bus: Bus, order: Order, operators: wire.Operators, keys: Sequence[Ed25519PrivateKey]
    ) -> None:
        """Raises InputRejected when the keys do not suffice, so that no device would obey."""
        self._bus = bus
        self._order = order
        self._operators = operators
        self._keys = signing_keys(operators, keys)
        self._topics = {device: wire.Topics(order.tenant, device) for device in order.devices}
        self._states: dict[str, wire.State] = {}
        self._pending: dict[str, wire.Desired] = {}
        self._problems: dict[str, str] = {}
        self._goals: dict[str, Goal] = {}
        self._heard_at: dict[str, float] = {}
        self._sent_at: dict[str, float] = {}
        # What a device last gave as the reason for not getting on.
        self._troubles: dict[str, str] = {}
        self.rows = {device: Row(device, Underway("reading its state")) for device in order.devices}

    def run(self, show: Callable[[Sequence[Row]], None]) -> list[Row]:
        """Do it; `show` gets all rows whenever something may have changed. Raises TransferFailed."""
        started = time.monotonic()
        rows = list(self.rows.values())
        self._bus.subscribe(
            [t for all_ in self._topics.values() for t in (all_.state, all_.presence, all_.desired)]
        )
        show(rows)
        deadline = started + self._order.timeout_s
        while self._open() and (now := time.monotonic()) < deadline:
            message = self._bus.next(min(_TICK_S, deadline - now))
            if message is not None:
                self._take(message)
            self._ask_or_judge(time.monotonic(), started)
            show(rows)
        for row in self._open():
            row.view = self._no_answer(row)
        show(rows)
        return rows

    def _open(self) -> list[Row]:
        return [row for row in self.rows.values() if not isinstance(row.view, Ended)]

    def _ask_or_judge(self, now: float, started: float) -> None:
        """A device is asked once its report and what was retained with it are here, whatever others do."""
        for row in self._open():
            row.seconds = now - started
            if row.device in self._goals:
                waited_s = now - self._sent_at[row.device]
                row.view = judge(self._goals[row.device], self._states[row.device], waited_s)
                if row.view.reason is not Reason.OK:
                    self._troubles[row.device] = f"[{row.view.reason.value}] {row.view.detail}"
            elif row.device in self._states:
                if now - self._heard_at[row.device] >= _SETTLE_S:
                    self._ask(row, self._states[row.device])
            elif row.device in self._problems or now - started >= _STATE_WAIT_S:
                row.view = Ended("no_state", Reason.NOT_FOUND, self._why_no_state(row.device))

    def _ask(self, row: Row, state: wire.State) -> None:
        device = row.device
        now_ms = time.time_ns() // 1_000_000
        desired = next_desired(
            self._order.model,
            tenant=self._order.tenant,
            device=device,
            state=state,
            pending=self._pending.get(device),
            now_ms=now_ms,
            expires_ms=now_ms + self._order.expires_s * 1000,
        )
        envelope = dsse.sign(canonical.to_bytes(desired), wire.DESIRED_TYPE, self._keys)
        self._goals[device] = Goal(
            self._order.model, desired.generation, canonical.sha256_hex(envelope), state
        )
        row.generation = desired.generation
        # The broker drops it when it expires, so that no device wakes up to an expired order.
        self._bus.publish(self._topics[device].desired, envelope, retain=True, expiry_s=self._order.expires_s)
        self._sent_at[device] = time.monotonic()
        row.view = Underway("sent")

    def _why_no_state(self, device: str) -> str:
        problem = self._problems.get(device)
        if problem:
            return f"its report cannot be read: {problem}; check that both ends run matching versions"
        return (
            f"it has never reported to this broker under tenant {self._order.tenant!r};"
            " start edge-agent on it, and check the id with `edge-fleet devices`"
        )

    def _no_answer(self, row: Row) -> Ended:
        state = self._states.get(row.device)
        if state is None:
            return Ended("no_state", Reason.NOT_FOUND, self._why_no_state(row.device))
        last = row.view.state if isinstance(row.view, Underway) else ""
        trouble = self._troubles.get(row.device)
        why = f"; the last trouble it told: {trouble}" if trouble else ""
        return Ended(
            "no_answer",
            Reason.DEADLINE_EXCEEDED,
            f"not done within {self._order.timeout_s:g} s; the device is {row.presence}, last {last!r}"
            f" at generation {state.generation}; the order stands and expires by itself{why}",
        )

    def _take(self, message: Message) -> None:
        parts = wire.split_topic(message.topic)
        if parts is None or parts[1] not in self.rows or not message.payload:
            return
        row, kind = self.rows[parts[1]], parts[2]
        try:
            if kind == "up/state":
                self._states[row.device] = wire.decode(message.payload, wire.State)
                row.version = self._version(self._states[row.device])
                self._heard_at.setdefault(row.device, time.monotonic())
            elif kind == "up/presence":
                row.presence = wire.decode(message.payload, wire.Presence).status
            elif kind == "down/desired":
                self._take_pending(row.device, message.payload)
        except MessageRejected as e:
            # A desired state that no operator signed, or a presence we cannot read, decides nothing.
            if kind == "up/state":
                self._problems[row.device] = e.what

    def _take_pending(self, device: str, envelope: bytes) -> None:
        """Remember the desired state that waits on the broker, if an operator signed it for this device."""
        payload = dsse.open_envelope(
            envelope, wire.DESIRED_TYPE, self._operators.trusted(), self._operators.threshold
        )
        desired = wire.decode(payload, wire.Desired)
        if (desired.tenant, desired.device) == (self._order.tenant, device):
            self._pending[device] = desired

    def _version(self, state: wire.State) -> str | None:
        return next((m.version for m in state.models if m.name == self._order.model.name), None)
