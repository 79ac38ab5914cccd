"""The MQTT 5 client: paho behind a queue. The agent's only file that imports paho.

paho's own thread is not used: this one reconnects with full jitter and takes a new session number each
time. Everything that happens arrives as a value in `inbox`; nothing is decided here.
"""

from __future__ import annotations

import logging
import queue
import random
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_agent.config import Broker
from edge_contract.errors import InputRejected, Reason

log = logging.getLogger("edge_agent.mqtt")

_FIRST_PAUSE_S = 0.5
_LOOP_S = 1.0
_NO_SUBSCRIBERS = 0x10


class Connected(NamedTuple):
    """A session began; `session` is the number its will carries."""

    session: int


class Disconnected(NamedTuple):
    """The session ended, or could not begin."""

    detail: str


class Message(NamedTuple):
    """A message of a subscription."""

    topic: str
    payload: bytes
    response_topic: str
    correlation: bytes


class Taken(NamedTuple):
    """The broker's answer to a publication: whether somebody may get it."""

    mid: int
    ok: bool


Incoming = Connected | Disconnected | Message | Taken


class Will(NamedTuple):
    """What the broker says when this device falls silent."""

    topic: str
    payload: Callable[[int], bytes]


class MqttClient:
    """One connection, kept alive by one thread. `publish` may be called from the control loop's thread."""

    def __init__(
        self,
        config: Broker,
        client_id: str,
        will: Will,
        subscriptions: list[str],
        first_session: int,
        inbox: queue.SimpleQueue[Any],
    ) -> None:
        self._config = config
        self._will = will
        self._subscriptions = subscriptions
        self._session = first_session
        self._inbox = inbox
        self._stopping = threading.Event()
        self._welcome = False
        self._client = self._make(client_id)
        self._thread = threading.Thread(target=self._run, name="mqtt", daemon=True)

    def start(self) -> None:
        """Connect, now and whenever the connection is lost."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread still runs; after `start` it ends by itself only through a mistake in here."""
        return self._thread.is_alive()

    def stop(self, farewell: tuple[str, bytes] | None = None) -> None:
        """Say farewell (retained), disconnect cleanly and end the thread."""
        if farewell is not None and self._client.is_connected():
            with suppress(RuntimeError):  # the connection was lost just now: the will speaks instead
                self.publish(*farewell, retain=True).wait_for_publish(timeout=2.0)
        self._client.disconnect()
        self._stopping.set()
        self._thread.join(timeout=5.0)

    def publish(
        self, topic: str, payload: bytes, *, retain: bool = False, correlation: bytes = b""
    ) -> paho.MQTTMessageInfo:
        """Hand one QoS 1 message to the client; the broker's answer arrives as Taken."""
        properties = None
        if correlation:
            properties = Properties(PacketTypes.PUBLISH)
            properties.CorrelationData = correlation
        return self._client.publish(topic, payload, qos=1, retain=retain, properties=properties)

    def _make(self, client_id: str) -> paho.Client:
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=paho.MQTTv5)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        # With this callback paho leaves all writing to the thread that runs the loop. Without it, publish()
        # writes from the caller's thread as well, and two half-written packets may interleave.
        client.on_socket_register_write = _leave_to_the_loop
        config = self._config
        if config.username:
            client.username_pw_set(config.username, _password(config.password_file))
        if config.tls_ca:
            _set_tls(client, config)
        return client

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            self._welcome = False
            detail = self._connect()
            if detail:
                self._inbox.put(Disconnected(detail))
            else:
                self._converse()
            # A broker that takes the connection and ends it (bad password, overload) is a failure too,
            # and one that restarts must not get its whole fleet back at the same moment.
            failures = 0 if self._welcome else failures
            cap_s = min(self._config.reconnect_max_s, _FIRST_PAUSE_S * 2**failures)
            failures = min(failures + 1, 16)
            self._stopping.wait(random.uniform(_FIRST_PAUSE_S / 10, cap_s))  # noqa: S311 - full jitter

    def _converse(self) -> None:
        """Run the session until it is lost; when stopping, until the last packet is out."""
        while self._client.loop(_LOOP_S) == paho.MQTT_ERR_SUCCESS:
            if self._stopping.is_set() and not self._client.want_write():
                return

    def _connect(self) -> str:
        """Begin a session; returns what went wrong, or nothing."""
        self._session += 1
        will_properties = Properties(PacketTypes.WILLMESSAGE)
        will_properties.WillDelayInterval = self._config.will_delay_s
        self._client.will_set(
            self._will.topic, self._will.payload(self._session), 1, retain=True, properties=will_properties
        )
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = self._config.session_expiry_s
        try:
            self._client.connect(
                self._config.host,
                self._config.port,
                self._config.keepalive_s,
                clean_start=False,
                properties=properties,
            )
        except (OSError, ValueError) as e:
            return f"{self._config.host}:{self._config.port}: {e}"
        return ""

    def _on_connect(
        self, client: paho.Client, userdata: Any, flags: Any, reason: ReasonCode, properties: Any
    ) -> None:
        if reason.is_failure:
            self._inbox.put(Disconnected(f"the broker refused the connection: {reason}"))
            return
        self._welcome = True
        client.subscribe([(topic, SubscribeOptions(qos=1)) for topic in self._subscriptions])
        self._inbox.put(Connected(self._session))

    def _on_disconnect(
        self, client: paho.Client, userdata: Any, flags: Any, reason: ReasonCode, properties: Any
    ) -> None:
        self._inbox.put(Disconnected(str(reason)))

    def _on_message(self, client: paho.Client, userdata: Any, message: paho.MQTTMessage) -> None:
        properties = message.properties
        self._inbox.put(
            Message(
                message.topic,
                bytes(message.payload),
                str(getattr(properties, "ResponseTopic", "")),
                bytes(getattr(properties, "CorrelationData", b"")),
            )
        )

    def _on_publish(
        self, client: paho.Client, userdata: Any, mid: int, reason: ReasonCode, properties: Any
    ) -> None:
        self._inbox.put(Taken(mid, not reason.is_failure and reason.value != _NO_SUBSCRIBERS))


def _leave_to_the_loop(client: paho.Client, userdata: Any, sock: Any) -> None:
    """The loop is woken by paho itself."""


def _set_tls(client: paho.Client, config: Broker) -> None:
    given = [path for path in (config.tls_ca, config.tls_cert, config.tls_key) if path]
    try:
        client.tls_set(
            ca_certs=config.tls_ca,
            certfile=config.tls_cert or None,
            keyfile=config.tls_key or None,
            tls_version=ssl.PROTOCOL_TLS_CLIENT,
        )
    except (OSError, ValueError) as e:
        raise InputRejected(
            Reason.BAD_CONFIG,
            f"[broker] {' or '.join(given)} cannot be used: {e}",
            "name PEM files that this user can read",
        ) from e


def _password(path: str) -> str | None:
    if not path:
        return None
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError as e:
        raise InputRejected(
            Reason.BAD_CONFIG,
            f"[broker] password_file {path}: {e.strerror}",
            "name a file that this user can read",
        ) from e
