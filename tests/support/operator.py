"""The other end of a device's conversation: what it says as values, and messages to it, signed or not.

A real MQTT 5 client. Unlike edge-fleet it can also say what it should not: forged, stale, for another device.
"""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import paho.mqtt.client as mqtt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_contract import canonical, dsse, wire
from tests.support.models import BundleOnDisk
from tests.support.waiting import wait_for

T = TypeVar("T")
DAY_MS = 86_400_000


class Heard(NamedTuple):
    """One message of the device as it came."""

    topic: str
    payload: bytes
    retained: bool
    correlation: bytes | None
    at_s: float


def now_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


class Operator:
    """Subscribed to everything below `up/` of one device."""

    def __init__(
        self,
        host: str,
        port: int,
        tenant: str,
        device: str,
        key: Ed25519PrivateKey | None = None,
        tls: tuple[Path, Path, Path] | None = None,
    ) -> None:
        """`key` signs what is said; `tls` names CA, certificate and its key for the broker."""
        self.topics = wire.Topics(tenant, device)
        self.tenant, self.device, self.key = tenant, device, key
        self.heard: list[Heard] = []
        self._generations = itertools.count(1)
        self.generation = 0
        self._lock = threading.Lock()
        self._subscribed = threading.Event()
        self._address = (host, port)
        self._client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2, f"operator-{uuid.uuid4().hex[:8]}", protocol=mqtt.MQTTv5
        )
        self._client.on_connect = lambda client, *_: client.subscribe(f"{self.topics.root}/up/#", 1)
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = self._on_message
        self._client.reconnect_delay_set(1, 1)
        if tls is not None:
            self._client.tls_set(*map(str, tls))

    def _on_message(self, client: mqtt.Client, userdata: object, message: mqtt.MQTTMessage) -> None:
        heard = Heard(
            message.topic,
            bytes(message.payload),
            message.retain,
            getattr(message.properties, "CorrelationData", None),
            time.monotonic(),
        )
        with self._lock:
            self.heard.append(heard)

    # what the device says

    def on(self, topic: str) -> list[Heard]:
        """Everything heard on a topic so far."""
        with self._lock:
            return [h for h in self.heard if h.topic == topic]

    def last(self, topic: str, kind: type[T]) -> T | None:
        """The newest message of a topic."""
        heard = self.on(topic)
        return wire.decode(heard[-1].payload, kind) if heard else None

    @property
    def presence(self) -> wire.Presence | None:
        """The newest presence."""
        return self.last(self.topics.presence, wire.Presence)

    @property
    def state(self) -> wire.State | None:
        """The newest reported state."""
        return self.last(self.topics.state, wire.State)

    def model(self, name: str) -> wire.ModelState | None:
        """The newest reported state of one model."""
        state = self.state
        return next((m for m in state.models if m.name == name), None) if state else None

    def records(self, topic: str) -> list[wire.Record]:
        """Rows of the device's outbox in the order in which they came."""
        return [wire.decode(h.payload, wire.Record) for h in self.on(topic)]

    def events(self, kind: str = "") -> list[wire.Event]:
        """Events, each row once."""
        rows = {(r.epoch, r.seq): r for r in self.records(self.topics.event)}
        found = [canonical.from_builtins(r.payload, wire.Event) for r in rows.values()]
        return [e for e in found if not kind or e.kind == kind]

    def wait(self, look: Callable[[], T], what: str, timeout_s: float = 20.0) -> T:
        """The first true value of `look`."""
        return wait_for(look, f"{what} (state {self.state})", timeout_s=timeout_s)

    def wait_online(self, timeout_s: float = 20.0) -> wire.Presence:
        """The presence of a device that is there."""

        def look() -> wire.Presence | None:
            presence = self.presence
            return presence if presence is not None and presence.status == "online" else None

        found = self.wait(look, "the device to be online", timeout_s)
        assert found is not None
        return found

    def wait_settled(self, name: str, timeout_s: float = 30.0) -> wire.ModelState:
        """The model's state when the attempt of the newest generation is over."""

        def look() -> wire.ModelState | None:
            state, model = self.state, self.model(name)
            accepted = state is not None and state.generation >= self.generation
            over = model is not None and model.state == "idle" and model.outcome != "none"
            return model if accepted and over and self._is_newest(model) else None

        found = self.wait(look, f"an outcome for {name}", timeout_s)
        assert found is not None
        return found

    def _is_newest(self, model: wire.ModelState | None) -> bool:
        wanted = self._wanted.get(model.name) if model else None
        return wanted is None or (model is not None and model.target_digest == wanted)

    # what it is told

    _wanted: Mapping[str, str] = {}

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool = False,
        response_topic: str = "",
        correlation: bytes = b"",
    ) -> None:
        """Publish anything anywhere; returns when the broker has it."""
        properties = Properties(PacketTypes.PUBLISH)
        if response_topic:
            properties.ResponseTopic = response_topic
        if correlation:
            properties.CorrelationData = correlation
        info = self._client.publish(topic, payload, 1, retain, properties)
        info.wait_for_publish(10)
        assert info.is_published()

    def signed_desired(self, *models: BundleOnDisk, **fields: Any) -> bytes:
        """A signed desired state; `fields` replace its own, `key` the operator's, `downgrade` allows one."""
        key, downgrade = fields.pop("key", self.key), fields.pop("downgrade", False)
        values: dict[str, Any] = {
            "schema": 1,
            "tenant": self.tenant,
            "device": self.device,
            "generation": self.generation,
            "issued_ms": now_ms(),
            "expires_ms": now_ms() + DAY_MS,
            "models": [
                wire.DesiredModel(b.manifest.name, b.manifest.version, b.digest, allow_downgrade=downgrade)
                for b in models
            ],
        }
        return dsse.sign(canonical.to_bytes(values | fields), wire.DESIRED_TYPE, [key])

    def desire(self, *models: BundleOnDisk, **fields: Any) -> None:
        """Tell the device which set to serve, under the next generation; `fields` as in `signed_desired`."""
        self.generation = max(self.generation, self.state.generation if self.state else 0) + 1
        self._wanted = {b.manifest.name: b.digest for b in models}
        self.publish(self.topics.desired, self.signed_desired(*models, **fields), retain=True)

    def deploy(self, *models: BundleOnDisk, timeout_s: float = 30.0) -> list[wire.ModelState]:
        """`desire`, and wait until each attempt is over."""
        self.desire(*models)
        return [self.wait_settled(b.manifest.name, timeout_s) for b in models]

    def signed_command(self, name: str, id_: str, args: Mapping[str, Any], **fields: Any) -> bytes:
        """A signed command; `fields` replace its own, `key` the operator's."""
        key = fields.pop("key", self.key)
        values: dict[str, Any] = {
            "schema": 1,
            "tenant": self.tenant,
            "device": self.device,
            "id": id_,
            "name": name,
            "issued_ms": now_ms(),
            "expires_ms": now_ms() + DAY_MS,
            "args": dict(args),
        }
        return dsse.sign(canonical.to_bytes(values | fields), wire.COMMAND_TYPE, [key])

    def command(self, name: str, *, id_: str = "", timeout_s: float = 20.0, **args: Any) -> wire.Result:
        """Send a signed command and wait for its answer."""
        id_ = id_ or uuid.uuid4().hex
        topic, correlation = f"{self.topics.result}/{uuid.uuid4().hex[:8]}", uuid.uuid4().bytes
        self.publish(
            self.topics.command,
            self.signed_command(name, id_, args),
            response_topic=topic,
            correlation=correlation,
        )
        self.wait(lambda: self.on(topic), f"the answer to {name}", timeout_s)
        heard = self.on(topic)[-1]
        assert heard.correlation == correlation
        result = wire.decode(heard.payload, wire.Result)
        assert result.id == id_
        return result

    def acknowledge(self, stream: str, epoch: str, seq: int) -> None:
        """Tell the device that everything up to `seq` is stored."""
        body = {"schema": 1, "stream": stream, "epoch": epoch, "seq": seq}
        self.publish(self.topics.ack, canonical.to_bytes(body))

    def __enter__(self) -> Operator:
        self._client.connect(*self._address)
        self._client.loop_start()
        assert self._subscribed.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.disconnect()
        self._client.loop_stop()
        line = self._client.socket()
        if line is not None:  # paho leaves it open when it was just connecting again
            line.close()
