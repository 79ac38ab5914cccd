"""The MQTT 5 client: paho behind a queue. The agent's only file that imports paho.

Every connection has a paho client of its own, made for it and dropped with it: so nothing of an earlier
session is sent again behind the outbox's back, certificates are read anew, and a client that makes no
progress can be given up. Everything that happens arrives as a value in `inbox`; nothing is decided here.
"""

from __future__ import annotations

import itertools
import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_agent.config import Broker
from edge_agent.messaging import tls
from edge_agent.messaging.mailbox import Mailbox
from edge_contract import wire
from edge_contract.errors import InputRejected, Reason

log = logging.getLogger("edge_agent.mqtt")

_FIRST_PAUSE_S = 0.5
_LOOP_S = 1.0
_CONNECT_S = 10.0
# A session that ends sooner counts as a failed attempt.
SHORT_S = 10.0
# A step of the thread may take so long beyond what it was meant to: names and handshakes can hang.
_GRACE_S = 60.0
# Threads that were given up and still hang somewhere; more would only add to the trouble.
_MAX_LOST_THREADS = 3
_SESSION_TAKEN_OVER = 0x8E
_IN_ORDER = 0x00
_FIRST_FAILURE = 0x80
# What the broker may send before it is answered, and the largest packet: a bound on memory.
# A packet is a message as large as this device opens any, its topic and its properties.
_RECEIVE_MAXIMUM, _MAXIMUM_PACKET_BYTES = 20, wire.LIMIT_BYTES + (8 << 10)
_DETAIL_CHARACTERS, _MAX_COMPLAINTS = 300, 16
# A flood waits at the broker instead of in this process.
_INBOX_PATIENCE_S = 5.0


class Connected(NamedTuple):
    """A session began; `session` is the number its will carries."""

    session: int
    resumed: bool = False


class Disconnected(NamedTuple):
    """The session ended, or could not begin. `taken_over`: somebody else uses this device's id.

    `in_order`: this device ended it.
    """

    detail: str
    taken_over: bool = False
    in_order: bool = False


class Message(NamedTuple):
    """A message of a subscription."""

    topic: str
    payload: bytes
    response_topic: str
    correlation: bytes


class Taken(NamedTuple):
    """The broker's answer to a publication: an MQTT 5 reason code."""

    session: int
    mid: int
    code: int


class Notice(NamedTuple):
    """Something that operators should know of the connection."""

    reason: Reason
    detail: str


Incoming = Connected | Disconnected | Message | Taken | Notice


class Will(NamedTuple):
    """What the broker says when this device falls silent."""

    topic: str
    payload: Callable[[int], bytes]


class MqttClient:
    """One connection, kept alive by one thread at a time. Used by the control loop's thread.

    Invariant: only the present line's thread puts values into `inbox`; one that was given up is mute.
    """

    def __init__(
        self,
        config: Broker,
        client_id: str,
        will: Will,
        subscriptions: list[str],
        first_session: int,
        inbox: Mailbox,
    ) -> None:
        """Raises InputRejected when files cannot be used or are another device's."""
        if config.tls_ca:
            tls.context(config)
            tls.check_identity(config, client_id)
        _password(config)
        sessions = itertools.count(first_session + 1)
        self._new_line = partial(_Line, config, client_id, will, subscriptions, sessions, inbox)
        self._line = self._new_line()
        self._lost: list[_Line] = []
        self.rebuilt = 0

    def start(self) -> None:
        """Connect, now and whenever the connection is lost; without a thread for it, `alive` stays false."""
        try:
            self._line.start()
        except RuntimeError as e:  # Python's word for "too many tasks": the same attempt may work later
            log.error("no thread for the connection can be made now: %s", e)

    @property
    def alive(self) -> bool:
        """Whether the thread runs. One that has ended or could not be started is made anew by `rebuild`."""
        return self._line.is_alive()

    def stuck(self) -> str:
        """What the thread has been doing for too long; empty when it gets on."""
        line = self._line
        return line.doing if line.is_alive() and time.monotonic() > line.due_s else ""

    def rebuild(self) -> bool:
        """Give the thread and its client up and begin anew, unless too many hang already."""
        self._lost = [line for line in self._lost if line.is_alive()]
        if len(self._lost) >= _MAX_LOST_THREADS:
            return False
        self._line.give_up()
        self._lost.append(self._line)
        self._line = self._new_line()
        self.rebuilt += 1
        self.start()
        return True

    def stop(self, farewell: tuple[str, bytes] | None = None) -> None:
        """Say farewell (retained), disconnect cleanly and end the thread."""
        self._line.stop(farewell)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, correlation: bytes = b"") -> int:
        """Hand one QoS 1 message to the client; the broker's answer arrives as Taken with this number.

        Without a connection the message is lost: whoever must not lose it waits for Taken.
        """
        properties = None
        if correlation:
            properties = Properties(PacketTypes.PUBLISH)
            properties.CorrelationData = correlation
        info = self._line.client.publish(topic, payload, qos=1, retain=retain, properties=properties)
        return int(info.mid)


class _Line(threading.Thread):
    """A thread that connects, converses and connects again, until it is stopped or given up."""

    def __init__(
        self,
        config: Broker,
        client_id: str,
        will: Will,
        subscriptions: list[str],
        sessions: Iterator[int],
        inbox: Mailbox,
    ) -> None:
        super().__init__(name="mqtt", daemon=True)
        self._config = config
        self._client_id = client_id
        self._will = will
        self._subscriptions = subscriptions
        self._sessions = sessions
        self._inbox = inbox
        self._stopping = threading.Event()
        self._given_up = False
        self._welcome_s = 0.0
        self._session = 0
        self._context: tls.Context | None = None
        self._stamp: tls.Stamp = ()
        self._complaints: set[str] = set()
        self.client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        self.doing, self.due_s = "starting", time.monotonic() + _GRACE_S

    def run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            self._welcome_s = 0.0
            self._begin("connecting", 3 * _CONNECT_S)
            detail, renewed = self._attempt()
            if detail:
                self._tell(Disconnected(detail))
            if renewed:
                failures = 0
                continue  # with the new certificate, at once: nothing has failed
            # A broker that takes the connection and ends it (bad password, overload) is a failure too,
            # and one that restarts must not get its whole fleet back at the same moment. Two devices
            # with one id throw each other out: they must not do so in a hurry.
            lasted_s = time.monotonic() - self._welcome_s if self._welcome_s else 0.0
            failures = 0 if lasted_s > SHORT_S else failures
            cap_s = min(self._config.reconnect_max_s, _FIRST_PAUSE_S * 2**failures)
            failures = min(failures + 1, 16)
            pause_s = random.uniform(_FIRST_PAUSE_S / 10, cap_s)  # noqa: S311 - full jitter
            self._begin("waiting before the next attempt", pause_s)
            self._stopping.wait(pause_s)

    def _attempt(self) -> tuple[str, bool]:
        """One session: what went wrong, or nothing; and whether it ended for a new certificate."""
        try:
            detail = self._connect()
            return detail, self._converse() if not detail else False
        except Exception as e:  # paho raises what it cannot decode; a mistake in here costs this session only
            problem = f"the MQTT client failed: {type(e).__name__}: {e}"[:_DETAIL_CHARACTERS]
            log.exception("%s", problem)
            self._close()
            self._complain(Reason.LINK_STALLED, problem)
            return problem, False

    def _complain(self, reason: Reason, detail: str) -> None:
        """Once for each cause: whoever sends rubbish sends it again with every session."""
        if detail not in self._complaints and len(self._complaints) < _MAX_COMPLAINTS:
            self._complaints.add(detail)
            self._tell(Notice(reason, detail))

    def stop(self, farewell: tuple[str, bytes] | None) -> None:
        """Called from another thread."""
        if farewell is not None and self.client.is_connected():
            with suppress(RuntimeError, ValueError):  # lost just now: the will speaks instead
                self.client.publish(*farewell, qos=1, retain=True).wait_for_publish(timeout=2.0)
        self.client.disconnect()
        self._stopping.set()
        if self.is_alive():
            self.join(timeout=5.0)

    def give_up(self) -> None:
        """Called from another thread: be mute from now on and end as soon as what hangs comes back."""
        self._given_up = True
        self._stopping.set()
        line = self.client.socket()
        if isinstance(line, socket.socket):
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)

    def _begin(self, doing: str, takes_s: float) -> None:
        self.doing, self.due_s = doing, time.monotonic() + takes_s + _GRACE_S

    def _tell(self, event: Incoming, size_bytes: int = 0) -> None:
        if not self._given_up:
            self._inbox.put(event, size_bytes)

    def _converse(self) -> bool:
        """Run the session until it is lost; when stopping, until the last packet is out.

        True when it was ended in order, because there are new certificates.
        """
        renewing = False
        while self.client.loop(_LOOP_S) == paho.MQTT_ERR_SUCCESS:
            self._begin("waiting for the broker", _LOOP_S)
            if self._stopping.is_set() and not self.client.want_write():
                break
            if self._welcome_s and not renewing and self._is_renewed():
                renewing = True
                self.client.disconnect()
        self._close()
        return renewing

    def _close(self) -> None:
        """paho keeps the socket when a thread was told to stop before it was connected."""
        line = self.client.socket()
        if line is not None:
            line.close()

    def _connect(self) -> str:
        """Begin a session; returns what went wrong, or nothing."""
        self._session = next(self._sessions)
        try:
            self.client = self._make()
            properties = Properties(PacketTypes.CONNECT)
            properties.SessionExpiryInterval = self._config.session_expiry_s
            properties.ReceiveMaximum = _RECEIVE_MAXIMUM
            properties.MaximumPacketSize = _MAXIMUM_PACKET_BYTES
            host, port, keepalive_s = self._config.host, self._config.port, self._config.keepalive_s
            self.client.connect(host, port, keepalive_s, clean_start=False, properties=properties)
        except (OSError, ValueError) as e:
            return f"{self._config.host}:{self._config.port}: {tls.explain(e)}"
        except InputRejected as e:  # a file that was good at the start
            return e.what
        return ""

    def _make(self) -> paho.Client:
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id=self._client_id, protocol=paho.MQTTv5)
        client.connect_timeout = _CONNECT_S
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        # With this callback paho leaves all writing to the thread that runs the loop. Without it, publish()
        # writes from the caller's thread as well, and two half-written packets may interleave.
        client.on_socket_register_write = _leave_to_the_loop
        config = self._config
        if config.username:
            client.username_pw_set(config.username, _password(config))
        if config.tls_ca:
            self._stamp = tls.stamp(config)
            self._context = tls.context(config)
            client.tls_set_context(self._context)
        properties = Properties(PacketTypes.WILLMESSAGE)
        properties.WillDelayInterval = config.will_delay_s
        client.will_set(
            self._will.topic, self._will.payload(self._session), 1, retain=True, properties=properties
        )
        return client

    def _is_renewed(self) -> bool:
        """Whether the files of the certificate have changed, and the new ones can be used."""
        config = self._config
        if not config.tls_ca or (stamp := tls.stamp(config)) == self._stamp:
            return False
        self._stamp = stamp
        try:
            tls.context(config)
            tls.check_identity(config, self._client_id)
        except InputRejected as e:  # half replaced: the other file changes the stamp again
            self._tell(Notice(e.reason, f"new certificate not used: {e.what}"))
            return False
        until = f", valid until {tls.expiry(config.tls_cert):%Y-%m-%d}" if config.tls_cert else ""
        self._tell(Notice(Reason.OK, f"new certificate{until}: connecting again with it"))
        return True

    def _on_connect(
        self, client: paho.Client, userdata: Any, flags: Any, reason: ReasonCode, properties: Any
    ) -> None:
        if reason.is_failure:
            self._tell(Disconnected(f"the broker refused the connection: {reason}"))
            return
        self._welcome_s = time.monotonic()
        client.subscribe([(topic, SubscribeOptions(qos=1)) for topic in self._subscriptions])
        self._tell(Connected(self._session, bool(flags.session_present)))

    def _on_disconnect(
        self, client: paho.Client, userdata: Any, flags: Any, reason: ReasonCode, properties: Any
    ) -> None:
        fault = self._context.fault if self._context is not None else ""
        ours = not fault and reason.value == _IN_ORDER
        detail = "this device ended its session in order" if ours else fault or str(reason)
        self._tell(Disconnected(detail, reason.value == _SESSION_TAKEN_OVER, ours))

    def _on_message(self, client: paho.Client, userdata: Any, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:  # of no subscription; taken, or the broker would send it for ever
            self._complain(Reason.MESSAGE_MALFORMED, "the broker sent a message whose topic is not UTF-8")
            return
        properties = message.properties
        self._wait_for_room()
        found = Message(
            topic,
            bytes(message.payload),
            str(getattr(properties, "ResponseTopic", "")),
            bytes(getattr(properties, "CorrelationData", b"")),
        )
        self._tell(found, sum(map(len, found)))

    def _wait_for_room(self) -> None:
        """While this thread reads nothing, the broker keeps the rest; too long, and it would miss pings."""
        deadline_s = time.monotonic() + _INBOX_PATIENCE_S
        while self._inbox.full and time.monotonic() < deadline_s:
            if self._stopping.wait(0.01):
                return

    def _on_publish(
        self, client: paho.Client, userdata: Any, mid: int, reason: ReasonCode, properties: Any
    ) -> None:
        self._tell(Taken(self._session, mid, reason.value))

    def _on_subscribe(
        self, client: paho.Client, userdata: Any, mid: int, reasons: list[ReasonCode], properties: Any
    ) -> None:
        refused = [str(r) for r in reasons if r.value >= _FIRST_FAILURE]
        if refused:
            self._tell(Notice(Reason.NOT_ALLOWED, f"the broker refused a subscription: {refused[0]}"))


def _leave_to_the_loop(client: paho.Client, userdata: Any, sock: Any) -> None:
    """The loop is woken by paho itself."""


def _password(config: Broker) -> str | None:
    if not config.password_file:
        return None
    try:
        return Path(config.password_file).read_text(encoding="utf-8").strip()
    except OSError as e:
        raise InputRejected(
            Reason.BAD_CONFIG,
            f"[broker] password_file {config.password_file}: {e.strerror}",
            "name a file that this user can read",
        ) from e
