"""One signed command to one device, and its answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_contract import canonical, dsse, wire
from edge_contract.errors import InputRejected, MessageRejected, Reason, TransferFailed
from fleet.bus import Bus, Message

Value = str | int | float | bool

_PERHAPS_NEW_KEYS = frozenset({Reason.UNSIGNED, Reason.SIGNATURE_INVALID})


def parse_args(pairs: tuple[str, ...]) -> dict[str, Value]:
    """`k=v` pairs; `true`, `false` and numbers become what they look like. Raises InputRejected."""
    result: dict[str, Value] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key or key in result:
            raise InputRejected(
                Reason.BAD_INPUT,
                f"--arg {pair!r} is not a new KEY=VALUE",
                "write it like --arg model=fashion",
            )
        result[key] = _value(text)
    return result


def send(
    bus: Bus,
    keys: Sequence[Ed25519PrivateKey],
    *,
    tenant: str,
    device: str,
    name: wire.CommandName,
    args: Mapping[str, Value],
    timeout_s: float,
) -> wire.Result:
    """Sign with all keys, send, wait.

    How many signatures it takes is known to the device. Raises TransferFailed when there is no answer,
    MessageRejected for a garbled one, and as soon as the device says that it refused the command.
    """
    now_ms = time.time_ns() // 1_000_000
    command = wire.Command(
        schema=1,
        tenant=tenant,
        device=device,
        id=uuid.uuid4().hex,
        name=name,
        issued_ms=now_ms,
        expires_ms=now_ms + round(timeout_s * 1000),
        args=dict(args),
    )
    topics = wire.Topics(tenant, device)
    envelope = dsse.sign(canonical.to_bytes(command), wire.COMMAND_TYPE, list(keys))
    label = wire.label_of(envelope)
    bus.subscribe([topics.event])
    answer = bus.request(
        topics.command,
        envelope,
        response_topic=f"{topics.result}/{uuid.uuid4().hex}",
        correlation=command.id.encode(),
        timeout_s=timeout_s,
        look=lambda message: _raise_refusal(message, topics.event, label, device),
    )
    if answer is None:
        raise TransferFailed(
            Reason.DEADLINE_EXCEEDED,
            f"{device}: no answer to {name} within {timeout_s:g} s; the command has expired",
            "see with `edge-fleet devices` whether it is online, and with `edge-fleet watch` what it refused",
        )
    return wire.decode(answer, wire.Result)


def _raise_refusal(message: Message, topic: str, label: str, device: str) -> None:
    """Nobody answers what is signed by nobody; a device tells it as an event."""
    if message.topic != topic:
        return
    try:
        payload = wire.decode(message.payload, wire.Record).payload
        event = canonical.from_builtins(payload, wire.Event)
    except (MessageRejected, canonical.DecodeFault):
        return  # `watch` says what is wrong with it
    if event.kind != "refused" or not event.detail.startswith(f"{label}: "):
        return
    what, _, step = event.detail.removeprefix(f"{label}: ").partition(f" [{event.reason.value}] → ")
    if event.reason in _PERHAPS_NEW_KEYS:
        step = f"try again in a minute: devices ask for new keys at most so often; if it stays, {step}"
    raise MessageRejected(event.reason, f"{device} refused the command: {what}", step or "see what it says")


def _value(text: str) -> Value:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
