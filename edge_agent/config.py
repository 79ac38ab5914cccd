"""The agent's configuration: one TOML file, strict, read once. Every bound has its unit in its name."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

from edge_contract import canonical
from edge_contract.errors import InputRejected, Reason
from edge_contract.manifest import Identifier, Positive, Share

Port = Annotated[int, Meta(ge=0, le=65535)]
Bytes = Annotated[int, Meta(ge=1)]
Seconds = Positive
Times = Annotated[int, Meta(ge=1)]
# `01:00-05:00`, local time, or `01:00-05:00 UTC`; update/window.py reads it.
WindowText = Annotated[str, Meta(pattern=r"^(([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d( UTC)?)?\Z")]


# How to write what is checked by a pattern, by the key's name.
_FORMS = {
    "window": 'a window is written like "01:00-05:00", or "22:30-04:00 UTC",',
    "tenant": "a tenant's name has letters, digits, '.', '_' and '-', begins with one of the first two,",
    "device": "a device's name has letters, digits, '.', '_' and '-', begins with one of the first two,",
}


class Broker(Struct, frozen=True, forbid_unknown_fields=True):
    """Where MQTT is. TLS is on when `tls_ca` is set; a client certificate is optional."""

    host: str = "127.0.0.1"
    port: Port = 1883
    keepalive_s: Annotated[int, Meta(ge=5, le=3600)] = 30
    session_expiry_s: Annotated[int, Meta(ge=0)] = 86400
    will_delay_s: Annotated[int, Meta(ge=0)] = 5
    reconnect_max_s: Seconds = 60.0
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    username: str = ""
    password_file: str = ""


class Registry(Struct, frozen=True, forbid_unknown_fields=True):
    """Where bundles come from, the pinned root of trust, and when and how bytes may come."""

    url: str = "http://127.0.0.1:8000"
    root: str = "/etc/edgeward/root.json"
    token_file: str = ""
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    timeout_s: Seconds = 20.0
    retries: Times = 5
    low_speed_bytes_per_s: Annotated[int, Meta(ge=0)] = 256
    low_speed_s: Seconds = 60.0
    deadline_s: Seconds = 21600.0
    max_rate_bytes_per_s: Annotated[int, Meta(ge=0)] = 0
    window: WindowText = ""
    metered: Literal["auto", "yes", "no"] = "auto"
    metered_max_bytes: Annotated[int, Meta(ge=0)] = 4 << 20
    keep_parts_s: Seconds = 1209600.0


class Serving(Struct, frozen=True, forbid_unknown_fields=True):
    """Sockets and bounds of the inference process. `socket` empty means `run_dir`/inference.sock."""

    tcp: str = "127.0.0.1:8080"
    socket: str = ""
    max_body_bytes: Bytes = 16 << 20
    max_queue: Times = 64
    workers: Times = 2
    request_timeout_s: Seconds = 30.0
    drain_timeout_s: Seconds = 30.0
    max_failed_starts: Times = 3
    load_timeout_s: Seconds = 60.0


class Update(Struct, frozen=True, forbid_unknown_fields=True):
    """How candidates are tried. Factors compare with the version before, or the manifest's expectation."""

    probation_s: Seconds = 60.0
    probation_min_requests: Annotated[int, Meta(ge=0)] = 50
    probation_max_s: Seconds = 600.0
    max_error_rate: Share = 0.02
    max_latency_factor: Positive = 3.0
    max_tail_factor: Positive = 6.0
    max_drift: Share = 0.35
    max_memory_growth_bytes: Bytes = 64 << 20
    max_restarts: Annotated[int, Meta(ge=0)] = 1
    preflight_timeout_s: Seconds = 120.0
    preflight_memory_bytes: Bytes = 2 << 30
    preflight_latency_factor: Positive = 5.0
    preflight_memory_factor: Positive = 2.0
    preflight_free_bytes: Annotated[int, Meta(ge=0)] = 16 << 20
    prepared_max_bytes: Annotated[int, Meta(ge=0)] = 1 << 30
    max_attempts: Times = 3
    retry_s: Seconds = 30.0
    retry_max_s: Seconds = 3600.0
    recheck_s: Seconds = 86400.0
    window: WindowText = ""
    disk_reserve_bytes: Annotated[int, Meta(ge=0)] = 16 << 20
    patch_memory_bytes: Annotated[int, Meta(ge=0)] = 128 << 20


class Telemetry(Struct, frozen=True, forbid_unknown_fields=True):
    """What is sampled, and how much of it waits on disk while the network is away."""

    interval_s: Seconds = 10.0
    outbox_max_bytes: Bytes = 8 << 20
    resend_s: Seconds = 30.0
    backlog_rows_per_s: Positive = 20.0


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """All of it."""

    tenant: Identifier
    device: Identifier
    state_dir: str = "/var/lib/edge-agent"
    run_dir: str = "/run/edge-agent"
    broker: Broker = Broker()
    registry: Registry = Registry()
    serving: Serving = Serving()
    update: Update = Update()
    telemetry: Telemetry = Telemetry()


def load(path: Path) -> Config:
    """Read and validate; raises InputRejected naming the file and the key."""
    next_step = "correct the file; docs/configuration.md lists every key"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputRejected(
            Reason.BAD_CONFIG, f"{path}: {e.strerror}", "name an existing file with --config"
        ) from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InputRejected(Reason.BAD_CONFIG, f"{path}: {e}", next_step) from e
    try:
        return canonical.from_builtins(values, Config)
    except canonical.DecodeFault as e:
        problem = _FORMS.get(e.path.rpartition(".")[2], "") if "regex" in e.problem else ""
        raise InputRejected(
            Reason.BAD_CONFIG, f"{path}: {problem or e.problem} at {e.path}", next_step
        ) from e


def host_port(text: str) -> tuple[str, int]:
    """`127.0.0.1:8080` or `[::1]:8080` → (host, port). Raises InputRejected."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise InputRejected(Reason.BAD_CONFIG, f"{text!r} is not HOST:PORT", "write it like 127.0.0.1:8080")
    return host.strip("[]"), int(port)
