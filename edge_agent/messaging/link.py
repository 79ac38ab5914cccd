"""The device's side of the conversation: presence, birth, state, and the outbox's way out.

It owns what is in flight; it knows neither models nor updates. Used by the control loop's thread.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from edge_agent.config import Config
from edge_agent.messaging.mqtt import Connected, Disconnected, Message, MqttClient, Taken, Will
from edge_agent.messaging.outbox import Outbox, Row
from edge_contract import canonical, wire

log = logging.getLogger("edge_agent.link")

# What paho may hold at once: it keeps nothing across a restart, so the rest stays in the outbox.
MAX_IN_FLIGHT = 20
_STATE_EVERY_MS = 250


class Link:
    """Presence, birth and state are retained; records go through the outbox."""

    def __init__(
        self,
        config: Config,
        outbox: Outbox,
        first_session: int,
        birth: Callable[[int, int], wire.Birth],
        clock_ms: Callable[[], int],
    ) -> None:
        self.topics = wire.Topics(config.tenant, config.device)
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.connected = False
        self.detail = "not connected yet"
        self._outbox = outbox
        self._birth = birth
        self._clock_ms = clock_ms
        self._session = first_session
        self._in_flight: dict[int, Row] = {}
        self._state: wire.State | None = None
        self._said: wire.State | None = None
        self._said_ms = 0
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

    def handle(self, event: Connected | Disconnected | Taken, now_ms: int) -> None:
        """What the client reports of itself."""
        if isinstance(event, Connected):
            log.info("connected to the broker (session %d)", event.session)
            self.connected, self.detail, self._session = True, "connected", event.session
            self._in_flight.clear()
            self._said = None
            self._client.publish(self.topics.presence, self._presence("online", event.session), retain=True)
            birth = self._birth(event.session, now_ms)
            self._client.publish(self.topics.birth, canonical.to_bytes(birth), retain=True)
        elif isinstance(event, Disconnected):
            if event.detail != self.detail:  # once for each cause, not at each attempt
                log.warning("not connected to the broker: %s", event.detail)
            self.connected, self.detail = False, event.detail
            self._in_flight.clear()
        else:
            self._taken(event, now_ms)

    def acknowledge(self, message: Message) -> None:
        """The controller's watermark. Raises MessageRejected."""
        self._outbox.acknowledged(wire.decode(message.payload, wire.Ack))

    def say_state(self, state: wire.State) -> None:
        """Report this state when it differs from what was said, and not too often."""
        self._state = state

    def reply(self, topic: str, correlation: bytes, body: bytes) -> None:
        """Answer a command."""
        self._client.publish(topic or self.topics.result, body, correlation=correlation)

    def tick(self, now_ms: int) -> None:
        """Send what is due."""
        if not self._client.alive:
            raise RuntimeError("the MQTT thread died; its traceback is above")
        if not self.connected:
            return
        self._send_state(now_ms)
        room = MAX_IN_FLIGHT - len(self._in_flight)
        if room <= 0:
            return
        flying = {(r.stream, r.epoch, r.seq) for r in self._in_flight.values()}
        for row in self._outbox.due(MAX_IN_FLIGHT, now_ms):
            if (row.stream, row.epoch, row.seq) not in flying and len(self._in_flight) < MAX_IN_FLIGHT:
                topic = self.topics.telemetry if row.stream == "tel" else self.topics.event
                self._in_flight[self._client.publish(topic, row.data).mid] = row

    def _taken(self, event: Taken, now_ms: int) -> None:
        row = self._in_flight.pop(event.mid, None)
        # A refusal and "nobody subscribed" also wait for the next try: only the controller's
        # acknowledgement deletes a row.
        if row is not None:
            self._outbox.sent(row, now_ms)

    def _send_state(self, now_ms: int) -> None:
        state = self._state
        if state is None or now_ms - self._said_ms < _STATE_EVERY_MS:
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
