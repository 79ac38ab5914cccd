"""Pure: MQTT topics and the messages on them. JSON, strict both ways; no client, no socket here.

Root: `edge/v1/{tenant}/{device}/`. What a device says is under `up/`, what it is told under `down/`.
Times are Unix milliseconds. Golden files in the tests pin every format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from msgspec import Meta, Struct

from edge_contract import canonical, dsse
from edge_contract.errors import MessageRejected, Reason
from edge_contract.manifest import Count, Digest, Identifier, Name, Version
from edge_contract.profile import Facts

SCHEMA = 1
DESIRED_TYPE = "application/vnd.edgeward.desired+json"
COMMAND_TYPE = "application/vnd.edgeward.command+json"
OPERATORS_TARGET = "operators.json"
# In the registry's timestamp metadata: when it was signed, whole Unix seconds.
SIGNED_AT = "x-edgeward-signed-at"
LIMIT_BYTES = 256 << 10

Millis = Annotated[int, Meta(ge=0, lt=1 << 53)]
Ordinal = Annotated[int, Meta(ge=1, lt=1 << 53)]
T = TypeVar("T")


class _Message(Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Topics:
    """The topics of one device."""

    def __init__(self, tenant: str, device: str) -> None:
        self.root = f"edge/v1/{tenant}/{device}"
        self.presence = f"{self.root}/up/presence"
        self.birth = f"{self.root}/up/birth"
        self.state = f"{self.root}/up/state"
        self.result = f"{self.root}/up/res"
        self.telemetry = f"{self.root}/up/tel"
        self.event = f"{self.root}/up/event"
        self.desired = f"{self.root}/down/desired"
        self.command = f"{self.root}/down/cmd"
        self.ack = f"{self.root}/down/ack"


def split_topic(topic: str) -> tuple[str, str, str] | None:
    """`edge/v1/T/D/up/state` → (T, D, `up/state`); None for anything else."""
    parts = topic.split("/", 4)
    if len(parts) != 5 or parts[:2] != ["edge", "v1"]:
        return None
    return parts[2], parts[3], parts[4]


class Presence(_Message, frozen=True):
    """Retained; `offline` is the will. A will with an older session than the last seen is ignored."""

    schema: Literal[1]
    status: Literal["online", "offline"]
    session: Count
    at_ms: Millis


class Birth(_Message, frozen=True):
    """Retained; who the device is and which metrics it sends."""

    schema: Literal[1]
    session: Count
    facts: Facts
    metrics: list[str]
    at_ms: Millis


UpdateState = Literal[
    "idle", "waiting", "resolving", "downloading", "preflight", "activating", "probation", "reverting"
]
Outcome = Literal["none", "committed", "failed", "reverted", "removed"]


class ModelState(_Message, frozen=True):
    """One model on one device: what serves now, what is being tried, how the last attempt ended."""

    name: Name
    state: UpdateState
    version: Version | None = None
    digest: Digest | None = None
    previous_version: Version | None = None
    previous_digest: Digest | None = None
    target_version: Version | None = None
    target_digest: Digest | None = None
    outcome: Outcome = "none"
    reason: Reason = Reason.OK
    detail: str = ""
    progress: Annotated[float, Meta(ge=0, le=1)] = 0.0
    since_ms: Millis = 0


class State(_Message, frozen=True):
    """Retained; what the device reports. `generation` is the newest desired state it accepted.

    `refused` says why the last desired state that came was refused, and `refused_sha256` which it was
    (the digest of its envelope); both are empty once a later one is accepted.
    """

    schema: Literal[1]
    generation: Count
    serving: bool
    models: list[ModelState]
    rejected: list[Digest]
    at_ms: Millis
    refused: str = ""
    refused_sha256: str = ""


class DesiredModel(_Message, frozen=True, omit_defaults=True):
    """One model of the desired set, by version and by the digest of its manifest.

    The two permissions are the operator's word, under the same signature: a release below the newest that
    this device has committed, and inputs or outputs other than those of the version that serves.
    """

    name: Name
    version: Version
    manifest_sha256: Digest
    allow_downgrade: bool = False
    allow_interface_change: bool = False


class Desired(_Message, frozen=True):
    """The whole set of models one device should serve. Level-triggered: the device converges to it."""

    schema: Literal[1]
    tenant: Identifier
    device: Identifier
    generation: Ordinal
    issued_ms: Millis
    expires_ms: Millis
    models: Annotated[list[DesiredModel], Meta(max_length=64)]


CommandName = Literal["status", "rollback", "bench", "clear-rejected"]


class Command(_Message, frozen=True):
    """Something to do once. The same id again returns the same result and does nothing."""

    schema: Literal[1]
    tenant: Identifier
    device: Identifier
    id: Identifier
    name: CommandName
    issued_ms: Millis
    expires_ms: Millis
    args: dict[str, str | int | float | bool] = {}


class Result(_Message, frozen=True):
    """The answer to a command, on its response topic with its correlation data."""

    schema: Literal[1]
    id: str
    ok: bool
    reason: Reason
    what: str
    next_step: str
    at_ms: Millis
    data: dict[str, Any] = {}


def label_of(command: bytes) -> str:
    """How a device calls a command, by its envelope, in the event that says why it refused it."""
    return f"command {canonical.sha256_hex(command)[:12]}"


StreamName = Literal["tel", "event"]
# First and last row of a range without holes.
Range = tuple[Ordinal, Ordinal]


class Gone(_Message, frozen=True, omit_defaults=True):
    """A tombstone: these rows left the device's outbox unacknowledged, and will not come (again).

    `acked`: so many rows directly before the first were acknowledged.
    """

    stream: StreamName
    epoch: Identifier
    first: Ordinal
    last: Ordinal
    acked: Count = 0


class Record(_Message, frozen=True, omit_defaults=True):
    """One row of the device's outbox. `lost` counts rows of this stream evicted so far in this epoch.

    `gone` names lost rows of any stream and epoch, until the controller has acknowledged that it knows.
    `acked`: so many rows directly before this one were acknowledged, so the device has them no more. To
    a controller that does not have them either, another one (or its own lost database) did that.
    """

    schema: Literal[1]
    stream: StreamName
    epoch: Identifier
    seq: Ordinal
    lost: Count
    payload: dict[str, Any]
    gone: Annotated[list[Gone], Meta(max_length=32)] = []
    acked: Count = 0


class Ack(_Message, frozen=True, omit_defaults=True):
    """The controller has committed every row of the stream's epoch up to `seq`, and those in `have`.

    Rows come newest first after an outage, so `have` names what is stored beyond the first gap. Rows that
    the device has named as gone count as stored: so it need not name them again.
    With `resend` the controller misses rows and saw none of them coming: the device sends what it still
    has, now instead of when its own timer says so. A controller that has just started asks in this way.
    """

    schema: Literal[1]
    stream: StreamName
    epoch: Identifier
    seq: Count
    resend: bool = False
    have: Annotated[list[Range], Meta(max_length=64)] = []


class VersionTelemetry(_Message, frozen=True):
    """Serving figures of one model version over one window. Latencies are None without requests."""

    name: Name
    version: Version
    requests: Count
    errors: Count
    rate_per_s: float
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None


class Telemetry(_Message, frozen=True):
    """One window of figures. None where the device has no such sensor."""

    at_ms: Millis
    window_s: float
    device: dict[str, float | None]
    models: list[VersionTelemetry]


class Event(_Message, frozen=True):
    """Something that happened, for people and programs: kind, subject, reason code, one sentence."""

    at_ms: Millis
    kind: str
    model: str = ""
    version: str = ""
    reason: Reason = Reason.OK
    detail: str = ""


class OperatorKey(_Message, frozen=True):
    """A raw Ed25519 public key in hex, with a label for people."""

    public_hex: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    label: str


class Operators(_Message, frozen=True):
    """The TUF target `operators.json`: who may sign desired states and commands."""

    schema: Literal[1]
    threshold: Annotated[int, Meta(ge=1)]
    keys: Annotated[list[OperatorKey], Meta(min_length=1, max_length=16)]

    def __post_init__(self) -> None:
        if self.threshold > len(self.keys):
            raise ValueError(f"threshold {self.threshold} is more than the {len(self.keys)} keys")

    def trusted(self) -> Mapping[str, bytes]:
        """Key id → raw public key."""
        raw = [bytes.fromhex(k.public_hex) for k in self.keys]
        return {dsse.key_id(public): public for public in raw}


def decode(data: bytes, kind: type[T]) -> T:
    """Decode an unsigned message. Raises MessageRejected naming the field."""
    try:
        return canonical.from_bytes(data, kind, limit_bytes=LIMIT_BYTES)
    except canonical.DecodeFault as e:
        raise MessageRejected(
            Reason.MESSAGE_MALFORMED,
            f"{kind.__name__.lower()} message: {e.problem} at {e.path}",
            "check that both ends run versions of edgeward that agree on this message",
        ) from e


def open_desired(
    data: bytes, operators: Operators, *, tenant: str, device: str, generation: int, now_ms: int
) -> Desired:
    """The desired state in a signed envelope, if it is for this device, new enough and not expired.

    `generation` is the newest one accepted so far; the same generation again is accepted (a retained
    message is delivered on every connect). Raises MessageRejected.
    """
    payload = dsse.open_envelope(data, DESIRED_TYPE, operators.trusted(), operators.threshold)
    desired = decode(payload, Desired)
    _check_audience(desired.tenant, desired.device, tenant, device)
    _check_time(desired.expires_ms, now_ms)
    if desired.generation < generation:
        raise MessageRejected(
            Reason.STALE_GENERATION,
            f"desired state of generation {desired.generation}, this device has accepted {generation}",
            "deploy again: edge-fleet takes the next generation from the device's reported state",
        )
    names = [m.name for m in desired.models]
    if len(set(names)) != len(names):
        raise MessageRejected(
            Reason.MESSAGE_MALFORMED, "desired state names a model twice", "name each model once"
        )
    return desired


def open_command(data: bytes, operators: Operators, *, tenant: str, device: str, now_ms: int) -> Command:
    """The command in a signed envelope, if it is for this device and not expired. Raises MessageRejected."""
    payload = dsse.open_envelope(data, COMMAND_TYPE, operators.trusted(), operators.threshold)
    command = decode(payload, Command)
    _check_audience(command.tenant, command.device, tenant, device)
    _check_time(command.expires_ms, now_ms)
    return command


def _check_audience(tenant: str, device: str, my_tenant: str, my_device: str) -> None:
    if (tenant, device) != (my_tenant, my_device):
        raise MessageRejected(
            Reason.WRONG_AUDIENCE,
            f"message is for {tenant}/{device}, this device is {my_tenant}/{my_device}",
            "sign one message per device",
        )


def _check_time(expires_ms: int, now_ms: int) -> None:
    if now_ms > expires_ms:
        raise MessageRejected(
            Reason.EXPIRED,
            f"message expired {(now_ms - expires_ms) / 1000:.0f} s ago by this device's clock",
            "send it again, and check the device's clock",
        )
