"""MQTT 5 for the operator: connect, subscribe, publish, request. This program's only file that imports paho.

It knows topics and bytes; what they mean is edge_contract.wire's.
"""

from __future__ import annotations

import queue
import ssl
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from types import TracebackType
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_contract.errors import InputRejected, Reason, TransferFailed

_TIMEOUT_S = 10.0
_KEEPALIVE_S = 30
_QUIET_S = 0.7
_FIRST_FAILURE = 0x80
_ANSWERS_KEPT = 4096
# A device sends again what was not acknowledged, so a controller that is overrun may drop.
_INBOX_FULL = 100_000


@dataclass(frozen=True, slots=True)
class Address:
    """Where the broker is and who we are to it. TLS is on when `tls_ca` is set."""

    host: str
    port: int
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    username: str = ""
    password: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Message:
    """One message as it came."""

    topic: str
    payload: bytes
    retained: bool
    correlation: bytes | None = None


class _ClosingSocket(ssl.SSLSocket):
    """Closes itself when a handshake fails; paho does not, and a controller tries for weeks."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


class Bus:
    """A connection for the length of a `with` block.

    Invariants: paho's thread only fills `_inbox`, `_codes` and the events; every method runs in the
    caller's thread. After a lost connection paho connects again by itself and the filters are
    subscribed again, so a caller that waits sees retained messages anew and loses no state.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._filters: list[str] = []
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        # Set by the first connection, or the reason why it failed; later ones are paho's to try again.
        self._connected = Event()
        self._refusal = ""
        self._lock = Lock()
        self._codes: dict[int, list[ReasonCode]] = {}
        self._answered = Event()
        self._client = self._make_client()

    def __enter__(self) -> Bus:
        """Connect. Raises TransferFailed (BROKER_UNREACHABLE)."""
        try:
            self._client.connect(self._address.host, self._address.port, _KEEPALIVE_S, clean_start=True)
        except (OSError, ValueError) as e:
            raise self._unreachable(str(e)) from e
        self._client.loop_start()
        try:
            self._await_connection()
        except TransferFailed:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.disconnect()
        self._close()

    def _close(self) -> None:
        self._client.loop_stop()
        line = self._client.socket()  # paho keeps it when its thread was told to stop first
        if line is not None:
            line.close()

    def subscribe(self, filters: Sequence[str]) -> None:
        """Subscribe at QoS 1 and wait for the broker's word. Raises TransferFailed."""
        new = [f for f in filters if f not in self._filters]
        if not new:
            return
        self._filters += new
        status, mid = self._client.subscribe(_subscription(new))
        if status != mqtt.MQTT_ERR_SUCCESS or mid is None:
            raise self._unreachable(mqtt.error_string(status))
        self._check(self._await_codes(mid, f"subscribe to {', '.join(new)}"), f"subscribing to {new[0]}")

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool = False,
        expiry_s: int | None = None,
        response_topic: str | None = None,
        correlation: bytes | None = None,
    ) -> None:
        """Publish at QoS 1 and wait until the broker has it. Raises TransferFailed."""
        properties = Properties(PacketTypes.PUBLISH)
        if expiry_s is not None:
            properties.MessageExpiryInterval = expiry_s
        if response_topic is not None:
            properties.ResponseTopic = response_topic
        if correlation is not None:
            properties.CorrelationData = correlation
        info = self._client.publish(topic, payload, qos=1, retain=retain, properties=properties)
        self._check(self._await_codes(info.mid, f"publish to {topic}"), f"publishing to {topic}")

    def post(self, topic: str, payload: bytes, *, expiry_s: int) -> None:
        """Publish at QoS 1 without waiting for anything; it is lost while there is no connection."""
        properties = Properties(PacketTypes.PUBLISH)
        properties.MessageExpiryInterval = expiry_s
        if self._client.is_connected():
            self._client.publish(topic, payload, qos=1, properties=properties)

    def next(self, timeout_s: float) -> Message | None:
        """The next message, or None when there was none in time."""
        try:
            return self._inbox.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return None

    def retained(self, filters: Sequence[str], wait_s: float) -> list[tuple[str, bytes]]:
        """(topic, payload) of the messages retained under `filters`: until none comes, `wait_s` at most.

        MQTT does not say when the last one has come; they follow the subscription without a pause.
        """
        self.subscribe(filters)
        deadline = time.monotonic() + wait_s
        found: list[tuple[str, bytes]] = []
        while (left_s := deadline - time.monotonic()) > 0:
            message = self.next(min(left_s, _QUIET_S))
            if message is None:
                break
            found.append((message.topic, message.payload))
        return found

    def request(
        self,
        topic: str,
        payload: bytes,
        *,
        response_topic: str,
        correlation: bytes,
        timeout_s: float,
        look: Callable[[Message], None] = lambda _: None,
    ) -> bytes | None:
        """Publish and wait for the answer with the same correlation data; None when there was none.

        The request expires with the wait, so that a device that comes back later does not act on it.
        Other messages that arrive meanwhile, as subscribed to before, are shown to `look` and dropped.
        """
        deadline = time.monotonic() + timeout_s
        self.subscribe([response_topic])
        self.publish(
            topic,
            payload,
            expiry_s=max(1, round(timeout_s)),
            response_topic=response_topic,
            correlation=correlation,
        )
        while (left_s := deadline - time.monotonic()) > 0:
            message = self.next(left_s)
            if message is not None and message.correlation == correlation:
                return message.payload
            if message is not None:
                look(message)
        return None

    def _make_client(self) -> mqtt.Client:
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=f"edge-fleet-{uuid.uuid4().hex[:12]}",
            protocol=MQTTProtocolVersion.MQTTv5,
        )
        client.connect_timeout = _TIMEOUT_S
        client.reconnect_delay_set(1, 30)
        if self._address.username:
            client.username_pw_set(self._address.username, self._address.password or None)
        if self._address.tls_ca:
            self._set_tls(client)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        return client

    def _set_tls(self, client: mqtt.Client) -> None:
        address = self._address
        files = [name for name in (address.tls_ca, address.tls_cert, address.tls_key) if name]
        missing = [name for name in files if not Path(name).is_file()]
        try:
            if not missing:
                context = ssl.create_default_context(cafile=address.tls_ca)
                context.sslsocket_class = _ClosingSocket
                if address.tls_cert:
                    context.load_cert_chain(address.tls_cert, address.tls_key or None)
                client.tls_set_context(context)
                return
            problem = f"{missing[0]}: no such file"
        except (ssl.SSLError, ValueError) as e:
            problem = f"{', '.join(files)}: {e}"
        raise InputRejected(
            Reason.BAD_INPUT,
            f"TLS for the broker: {problem}",
            "name PEM files with --tls-ca, --tls-cert and --tls-key",
        )

    def _await_connection(self) -> None:
        deadline = time.monotonic() + _TIMEOUT_S
        while not self._connected.wait(0.05):
            if self._refusal:
                raise self._unreachable(self._refusal)
            if time.monotonic() > deadline:
                raise self._unreachable(f"no MQTT 5 answer within {_TIMEOUT_S:.0f} s")

    def _await_codes(self, mid: int, what: str) -> list[ReasonCode]:
        deadline = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline:
            with self._lock:
                self._answered.clear()
                if mid in self._codes:
                    return self._codes.pop(mid)
            self._answered.wait(0.2)
        raise self._unreachable(f"no answer to {what} within {_TIMEOUT_S:.0f} s")

    def _check(self, codes: list[ReasonCode], what: str) -> None:
        failed = [code for code in codes if code.value >= _FIRST_FAILURE]
        if failed:
            raise TransferFailed(
                Reason.NOT_ALLOWED,
                f"broker {self._address} refused {what}: {failed[0]}",
                "check the broker's access rules for this user",
            )

    def _unreachable(self, why: str) -> TransferFailed:
        return TransferFailed(
            Reason.BROKER_UNREACHABLE,
            f"broker {self._address} cannot be used: {why}",
            "check --broker HOST:PORT (or EDGEWARD_BROKER), the network, and that it speaks MQTT 5",
        )

    def _on_connect(
        self, client: mqtt.Client, _data: Any, _flags: Any, code: ReasonCode, _properties: Any
    ) -> None:
        if code.is_failure:
            self._refusal = f"it refused the connection: {code}"
            client.disconnect()  # or paho would sleep and try again
            return
        if self._filters:
            client.subscribe(_subscription(self._filters))
        self._connected.set()

    def _on_disconnect(
        self, client: mqtt.Client, _data: Any, _flags: Any, code: ReasonCode, _properties: Any
    ) -> None:
        if not self._connected.is_set() and not self._refusal:
            self._refusal = f"it hung up before it answered ({code}); does it want TLS or a certificate?"
            client.disconnect()

    def _on_message(self, _client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
        if self._inbox.qsize() >= _INBOX_FULL:
            return
        correlation = getattr(message.properties, "CorrelationData", None)
        self._inbox.put(Message(message.topic, bytes(message.payload), message.retain, correlation))

    def _on_publish(
        self, _client: mqtt.Client, _data: Any, mid: int, code: ReasonCode, _properties: Any
    ) -> None:
        self._settle(mid, [code])

    def _on_subscribe(
        self, _client: mqtt.Client, _data: Any, mid: int, codes: list[ReasonCode], _properties: Any
    ) -> None:
        self._settle(mid, codes)

    def _settle(self, mid: int, codes: list[ReasonCode]) -> None:
        with self._lock:
            self._codes[mid] = codes
            if len(self._codes) > _ANSWERS_KEPT:  # to what was posted, which nobody waits for
                self._codes.pop(next(iter(self._codes)))
            self._answered.set()


def _subscription(filters: Sequence[str]) -> list[tuple[str, SubscribeOptions]]:
    return [(name, SubscribeOptions(qos=1)) for name in filters]
