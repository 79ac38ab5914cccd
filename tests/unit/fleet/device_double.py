"""A device as edge-fleet sees one: a real MQTT 5 client that keeps edge_contract.wire's side of the talk.

It verifies what it is sent as the agent does. What it then reports is scripted: after accepting a
desired state it publishes the given model states one after the other.
"""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import msgspec
import paho.mqtt.client as mqtt
from msgspec.structs import replace
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_contract import canonical, wire
from edge_contract.errors import MessageRejected, Reason
from edge_contract.profile import Facts

FACTS = Facts(
    architecture="aarch64",
    cpu="Cortex-A72",
    isa=["neon"],
    cores=4,
    memory_bytes=4 << 30,
    os="Linux",
    python="3.11.2",
    agent_version="0.1.0",
    runtimes={"onnxruntime": "1.18.0"},
)

Script = Callable[[wire.DesiredModel, wire.ModelState | None], Sequence[wire.ModelState]]


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def commits(model: wire.DesiredModel, before: wire.ModelState | None) -> list[wire.ModelState]:
    """A good update."""
    busy = wire.ModelState(
        model.name,
        "downloading",
        target_version=model.version,
        target_digest=model.manifest_sha256,
        progress=0.5,
    )
    return [
        busy,
        replace(busy, state="probation", version=model.version, digest=model.manifest_sha256, progress=0.0),
        wire.ModelState(
            model.name,
            "idle",
            version=model.version,
            digest=model.manifest_sha256,
            previous_version=None if before is None else before.version,
            previous_digest=None if before is None else before.digest,
            target_version=model.version,
            target_digest=model.manifest_sha256,
            outcome="committed",
            since_ms=now_ms(),
        ),
    ]


def reverts(model: wire.DesiredModel, before: wire.ModelState | None) -> list[wire.ModelState]:
    """A bad version: tried, then thrown out."""
    base = before or wire.ModelState(model.name, "idle")
    tried = replace(base, target_version=model.version, target_digest=model.manifest_sha256, outcome="none")
    return [
        replace(tried, state="probation"),
        replace(
            tried,
            state="idle",
            outcome="reverted",
            reason=Reason.ERROR_RATE,
            detail="12 % of requests failed",
            since_ms=now_ms(),
        ),
    ]


def stalls(model: wire.DesiredModel, before: wire.ModelState | None) -> list[wire.ModelState]:
    """Never gets further than downloading."""
    return commits(model, before)[:1]


class Device:
    """Use as a context manager; `desired`, `acks` and `commands` hold what came."""

    def __init__(
        self,
        broker: str,
        tenant: str,
        name: str,
        operators: wire.Operators,
        *,
        script: Script = commits,
        models: Sequence[wire.ModelState] = (),
        generation: int = 0,
        session: int = 1,
    ) -> None:
        self.topics = wire.Topics(tenant, name)
        self.tenant, self.name, self.operators, self.script = tenant, name, operators, script
        self.session = session
        self.state = wire.State(
            schema=1, generation=generation, serving=True, models=list(models), rejected=[], at_ms=now_ms()
        )
        self.desired: list[wire.Desired] = []
        self.commands: list[wire.Command] = []
        self.acks: list[wire.Ack] = []
        self.answer: Callable[[wire.Command], wire.Result] = lambda c: wire.Result(
            1, c.id, True, Reason.OK, "done", "", now_ms(), {"args": dict(c.args)}
        )
        self.correlate: Callable[[bytes], bytes] = lambda data: data
        self.raw_answer: bytes | None = None
        self._host, _, port = broker.rpartition(":")
        self._port = int(port)
        self._ready = threading.Event()
        self._client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2, client_id=f"{name}-{uuid.uuid4().hex[:6]}", protocol=mqtt.MQTTv5
        )
        self._client.will_set(self.topics.presence, self._presence("offline"), 1, True)
        self._client.on_connect = lambda *_: self._client.subscribe([(f"{self.topics.root}/down/#", 1)])
        self._client.on_subscribe = lambda *_: self._ready.set()
        self._client.on_disconnect = lambda *_: self._ready.clear()
        self._client.on_message = self._on_message

    def __enter__(self) -> Device:
        self._client.connect(self._host, self._port, 30)
        self._client.loop_start()
        assert self._ready.wait(5), "the double's broker did not answer"
        self._say(self.topics.presence, self._presence("online"))
        birth = wire.Birth(1, self.session, FACTS, ["cpu_percent"], now_ms())
        self._say(self.topics.birth, canonical.to_bytes(birth))
        self.report(self.state)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.publish(self.topics.presence, self._presence("offline"), 1, True).wait_for_publish(5)
        self._client.disconnect()
        self._client.loop_stop()

    def die(self) -> None:
        """Go without a word: the broker publishes the will."""
        self._client.on_disconnect = None
        self._client.loop_stop()
        line = self._client.socket()
        assert isinstance(line, socket.socket)
        line.shutdown(socket.SHUT_RDWR)
        line.close()

    def report(self, state: wire.State) -> None:
        self.state = state
        self._say(self.topics.state, canonical.to_bytes(state))

    def send(self, record: wire.Record) -> None:
        """Publish one row of the outbox and wait until the broker has it."""
        topic = self.topics.telemetry if record.stream == "tel" else self.topics.event
        self._client.publish(topic, canonical.to_bytes(record), 1).wait_for_publish(5)

    def wait_for_broker(self, timeout_s: float) -> bool:
        """Whether it is connected, and subscribed anew, within the time."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._client.is_connected() and self._ready.is_set():
                return True
            time.sleep(0.02)
        return False

    def say_raw(self, topic: str, payload: bytes, *, retain: bool = True) -> None:
        self._client.publish(topic, payload, 1, retain).wait_for_publish(5)

    def _say(self, topic: str, payload: bytes) -> None:
        self._client.publish(topic, payload, 1, True)

    def _presence(self, status: Any) -> bytes:
        return canonical.to_bytes(wire.Presence(1, status, self.session, now_ms()))

    def _on_message(self, _client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
        if message.topic == self.topics.desired and message.payload:
            self._on_desired(bytes(message.payload))
        elif message.topic == self.topics.command:
            self._on_command(message)
        elif message.topic == self.topics.ack:
            self.acks.append(wire.decode(bytes(message.payload), wire.Ack))

    def _on_desired(self, payload: bytes) -> None:
        try:
            desired = wire.open_desired(
                payload,
                self.operators,
                tenant=self.tenant,
                device=self.name,
                generation=self.state.generation,
                now_ms=now_ms(),
            )
        except MessageRejected as e:
            sha256 = canonical.sha256_hex(payload)
            self.report(replace(self.state, refused=str(e), refused_sha256=sha256, at_ms=now_ms()))
            return
        self.desired.append(desired)
        known = {m.name: m for m in self.state.models}
        # Accepted, and not begun: the outcome of the attempt before is still in the report.
        self.report(replace(self.state, generation=desired.generation, refused="", refused_sha256=""))
        for model in desired.models:
            before = known.get(model.name)
            if before is not None and before.digest == model.manifest_sha256:
                continue
            for step in self.script(model, before):
                known[model.name] = step
                self.report(replace(self.state, models=list(known.values()), at_ms=now_ms()))

    def _refuse(self, detail: str, reason: Reason) -> None:
        event = wire.Event(now_ms(), "refused", reason=reason, detail=detail)
        record = wire.Record(1, "event", "e1", 1, 0, msgspec.to_builtins(event))
        self._client.publish(self.topics.event, canonical.to_bytes(record), 1)

    def _on_command(self, message: mqtt.MQTTMessage) -> None:
        payload = bytes(message.payload)
        try:
            command = wire.open_command(
                payload, self.operators, tenant=self.tenant, device=self.name, now_ms=now_ms()
            )
        except MessageRejected as e:
            self._refuse(f"{wire.label_of(payload)}: {e}", e.reason)
            return
        self.commands.append(command)
        request = message.properties
        assert request is not None
        properties = Properties(PacketTypes.PUBLISH)
        properties.CorrelationData = self.correlate(request.CorrelationData)
        answer = self.raw_answer or canonical.to_bytes(self.answer(command))
        self._client.publish(request.ResponseTopic, answer, 1, properties=properties)
