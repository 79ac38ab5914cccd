"""The device's side of the conversation: presence, birth, state, and the outbox's way out.

It owns what is in flight; it knows neither models nor updates. Used by the control loop's thread.
Which row goes when is pace.py's. Times named `now_ms` are monotonic, except inside messages.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from msgspec.structs import replace

from edge_agent.config import Config
from edge_agent.messaging.mailbox import Mailbox
from edge_agent.messaging.mqtt import (
    SHORT_S,
    Connected,
    Disconnected,
    Message,
    MqttClient,
    Notice,
    Taken,
    Will,
)
from edge_agent.messaging.outbox import Outbox
from edge_agent.messaging.pace import MAX_IN_HAND, NO_SUBSCRIBERS, Pace
from edge_contract import canonical, wire
from edge_contract.errors import Reason

log = logging.getLogger("edge_agent.link")

__all__ = ["MAX_IN_HAND", "Link"]

_STATE_EVERY_MS = 250
# Without an answer of the broker to what is in hand for so many keepalives, the client is given up.
_STALL_KEEPALIVES = 2
# A client whose thread dies at once again is no reason to make threads without end.
_REVIVE_EVERY_MS = 5_000
# A second device with this id is told once in so long: the two throw each other out again and again.
_DOUBLE_EVERY_MS = 3_600_000
# Not every broker says that a session was taken over; so many short sessions within this time say it too.
_THROWN_OUT_TIMES, _THROWN_OUT_WITHIN_MS = 3, 120_000
_MAX_REPLIES = 64
_REPLY_LIFE_MS = 60_000

Report = Callable[[str, Reason, str], None]


class _Reply(NamedTuple):
    topic: str
    correlation: bytes
    body: bytes
    until_ms: int


class Link:
    """Presence, birth and state are retained; records go through the outbox."""

    def __init__(
        self,
        config: Config,
        outbox: Outbox,
        first_session: int,
        birth: Callable[[int, int], wire.Birth],
        clock_ms: Callable[[], int],
        report: Report,
    ) -> None:
        """`clock_ms` is the wall clock of messages; `report(kind, reason, detail)` makes an event."""
        self.topics = wire.Topics(config.tenant, config.device)
        self.inbox = Mailbox()
        self.connected = False
        self.detail = "not connected yet"
        self._device = config.device
        self._outbox = outbox
        self._birth = birth
        self._clock_ms = clock_ms
        self._report = report
        self._session = first_session
        self._stall_ms = _STALL_KEEPALIVES * config.broker.keepalive_s * 1000
        self._pace = Pace(
            resend_ms=int(config.telemetry.resend_s * 1000),
            rows_per_s=config.telemetry.backlog_rows_per_s,
            jitter=random.random,
        )
        self._swaps = outbox.swaps
        self._rows: dict[int, int] = {}  # the client's number of a publication → the row's id
        self._replies: dict[int, _Reply] = {}
        self._unsent: list[_Reply] = []
        self._state: wire.State | None = None
        self._said: wire.State | None = None
        self._said_ms: int | None = None
        self._connected_ms = self._next_revival_ms = 0
        self._thrown_out: list[int] = []
        self._told_double_ms: int | None = None
        self._told_refusals: set[int] = set()
        will = Will(self.topics.presence, lambda session: self._presence("offline", session))
        subscriptions = [self.topics.desired, self.topics.command, self.topics.ack]
        self._client = MqttClient(
            config.broker, config.device, will, subscriptions, first_session, self.inbox
        )

    def start(self) -> None:
        """Begin to connect."""
        self._client.start()

    def stop(self) -> None:
        """Say offline and disconnect."""
        self._client.stop((self.topics.presence, self._presence("offline", self._session)))

    def handle(self, event: Connected | Disconnected | Taken | Notice, now_ms: int) -> None:
        """What the client reports of itself."""
        if isinstance(event, Connected):
            self._connected(event, now_ms)
        elif isinstance(event, Disconnected):
            self._disconnected(event, now_ms)
        elif isinstance(event, Notice):
            log.log(logging.INFO if event.reason is Reason.OK else logging.WARNING, "%s", event.detail)
            self._report("link", event.reason, event.detail)
        elif event.session == self._session:
            self._taken(event, now_ms)

    def acknowledge(self, message: Message) -> None:
        """The controller's watermark. Raises MessageRejected."""
        ack = wire.decode(message.payload, wire.Ack)
        self._outbox.acknowledged(ack)
        if ack.resend:
            self._pace.resend(ack.stream)

    def say_state(self, state: wire.State) -> None:
        """Report this state when it differs from what was said, and not too often."""
        self._state = state

    def reply(self, topic: str, correlation: bytes, body: bytes, now_ms: int) -> None:
        """Answer a command: now, or with the next connection if that is soon."""
        self._unsent.append(_Reply(topic, correlation, body, now_ms + _REPLY_LIFE_MS))
        del self._unsent[:-_MAX_REPLIES]

    def store(self, now_ms: int) -> None:
        """Make durable what was put and acknowledged since the last call, and tell of faulty disks."""
        removed = self._outbox.flush(now_ms)
        if self._outbox.swaps != self._swaps:
            self._swaps = self._outbox.swaps
            self._rows.clear()
            self._pace.begin(self._outbox.newest_id, now_ms, new_box=True)
        else:
            self._pace.gone(removed)
        for news in self._outbox.take_news():
            self._report("storage", Reason.STORAGE_FAULT, news)

    def tick(self, now_ms: int) -> None:
        """Send what is due."""
        self._watch(now_ms)
        if not self.connected:
            return
        self._send_state(now_ms)
        self._send_replies(now_ms)
        for ask in self._pace.asks(self._outbox.newest_id, now_ms):
            rows = self._outbox.after(ask.priority, ask.after_id, ask.until_id, ask.limit, now_ms)
            for row in rows:
                if self._pace.take(ask, row.id, row.stream, now_ms):
                    topic = self.topics.telemetry if row.stream == "tel" else self.topics.event
                    self._rows[self._client.publish(topic, row.data)] = row.id
            self._pace.looked(ask, len(rows))

    def _connected(self, event: Connected, now_ms: int) -> None:
        log.info(
            "connected to the broker (session %d%s)", event.session, ", resumed" if event.resumed else ""
        )
        self.connected, self.detail, self._session = True, "connected", event.session
        self._connected_ms = now_ms
        self._begin(now_ms)
        self._said = None
        self._client.publish(self.topics.presence, self._presence("online", event.session), retain=True)
        birth = self._birth(event.session, self._clock_ms())
        self._client.publish(self.topics.birth, canonical.to_bytes(birth), retain=True)

    def _disconnected(self, event: Disconnected, now_ms: int) -> None:
        if event.detail != self.detail:  # once for each cause, not at each attempt
            level = logging.INFO if event.in_order else logging.WARNING
            log.log(level, "not connected to the broker: %s", event.detail)
        short = self.connected and now_ms - self._connected_ms < SHORT_S * 1000
        self.connected, self.detail = False, event.detail
        self._begin(now_ms)
        self._thrown_out = [ms for ms in self._thrown_out if now_ms - ms < _THROWN_OUT_WITHIN_MS]
        self._thrown_out += [now_ms] if short else []
        if event.taken_over:
            self._suspect(f"another client connected to the broker as {self._device!r}", now_ms)
        elif len(self._thrown_out) >= _THROWN_OUT_TIMES:
            often = f"{len(self._thrown_out)} sessions in a row ended soon after they began"
            self._suspect(f"{often}: perhaps another client connects as {self._device!r}", now_ms)

    def _suspect(self, detail: str, now_ms: int) -> None:
        told_ms = self._told_double_ms
        if told_ms is not None and now_ms - told_ms < _DOUBLE_EVERY_MS:
            return
        self._told_double_ms = now_ms
        detail += "; two devices may have one id, or the same agent runs twice"
        log.error("%s", detail)
        self._report("link", Reason.DUPLICATE_DEVICE, detail)

    def _begin(self, now_ms: int) -> None:
        """Nothing is in the client's hands any more."""
        self._rows.clear()
        self._unsent = [*self._replies.values(), *self._unsent][-_MAX_REPLIES:]
        self._replies.clear()
        self._pace.begin(self._outbox.newest_id, now_ms)

    def _taken(self, event: Taken, now_ms: int) -> None:
        self._replies.pop(event.mid, None)
        id_ = self._rows.pop(event.mid, None)
        if id_ is None:
            return
        self._pace.answered(id_, event.code, now_ms)
        if event.code >= NO_SUBSCRIBERS and event.code not in self._told_refusals:
            self._told_refusals.add(event.code)
            why = "nobody is subscribed" if event.code == NO_SUBSCRIBERS else "the broker refuses records"
            log.warning("%s (reason code 0x%02x): this device's rows wait in the outbox", why, event.code)

    def _watch(self, now_ms: int) -> None:
        """Give a client up that makes no progress."""
        problem = self._client.stuck()
        if not self._client.alive:
            if now_ms < self._next_revival_ms:
                return
            self._next_revival_ms = now_ms + _REVIVE_EVERY_MS
            problem = "its thread has ended or could not be made"
        since_ms = self._pace.oldest_in_hand_ms() if self.connected else None
        if since_ms is not None and now_ms - since_ms > self._stall_ms:
            problem = f"no answer to a publication for {(now_ms - since_ms) / 1000:.0f} s"
        if not problem or not self._client.rebuild():
            return
        detail = f"the MQTT client made no progress ({problem}) and was made anew ({self._client.rebuilt})"
        self._disconnected(Disconnected(detail), now_ms)
        self._report("link", Reason.LINK_STALLED, detail)

    def _send_replies(self, now_ms: int) -> None:
        for reply in self._unsent:
            if now_ms < reply.until_ms:
                topic = reply.topic or self.topics.result
                mid = self._client.publish(topic, reply.body, correlation=reply.correlation)
                self._replies[mid] = reply
        self._unsent.clear()

    def _send_state(self, now_ms: int) -> None:
        state = self._state
        if state is None or (self._said_ms is not None and now_ms - self._said_ms < _STATE_EVERY_MS):
            return
        if self._said is not None and _same(state, self._said):
            return
        self._client.publish(self.topics.state, canonical.to_bytes(state), retain=True)
        self._said, self._said_ms = state, now_ms

    def _presence(self, status: Any, session: int) -> bytes:
        return canonical.to_bytes(wire.Presence(1, status, session, self._clock_ms()))


def _same(a: wire.State, b: wire.State) -> bool:
    """Whether only the time differs."""
    return replace(a, at_ms=0) == replace(b, at_ms=0)
