"""A development MQTT 5 broker on loopback: rumqttd, as the package `iotcore` brings it.

It is for trials and tests: no rights, no persistence. For devices use mosquitto or a cluster.
The package runs it in a child that ends with this process, also when this process is killed.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Protocol

from edge_contract.errors import DeviceUnfit, InputRejected, Reason, TransferFailed

HOST = "127.0.0.1"
MAX_PAYLOAD_BYTES = 1 << 20

# rumqttd's own listener speaks 3.1.1 only; `[v5.1]` is its first MQTT 5 listener. Segments bound
# what it keeps in memory per topic filter. max_outgoing_packet_count bounds what it sends at once.
_CONFIG = """\
id = 0

[router]
id = 0
max_connections = 1000
max_outgoing_packet_count = 200
max_segment_size = 104857600
max_segment_count = 10

[v5.1]
name = "v5-1"
listen = "{host}:{port}"
next_connection_delay_ms = 1

[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = {max_payload_bytes}
max_inflight_count = 200
dynamic_filters = true
"""


class Running(Protocol):
    """What is used of iotcore's broker."""

    def start(self) -> object:
        """Start its child and wait until it listens."""

    def stop(self) -> None:
        """End its child."""

    @property
    def is_running(self) -> bool:
        """Whether its child lives."""


@contextmanager
def running(port: int) -> Iterator[tuple[int, Running]]:
    """The broker, listening; yields its port and itself. Port 0 takes a free one.

    Raises DeviceUnfit (the package is missing) or InputRejected (the port is taken).
    """
    port = port or _free_port()
    broker = _started(_package(), port)
    try:
        yield port, broker
    finally:
        broker.stop()


def _started(iotcore: ModuleType, port: int) -> Running:
    # The configuration is needed until it listens; nothing is left behind even by a kill after that.
    with TemporaryDirectory(prefix="edge-fleet-broker-") as scratch:
        path = Path(scratch, "rumqttd.toml")
        path.write_text(_CONFIG.format(host=HOST, port=port, max_payload_bytes=MAX_PAYLOAD_BYTES))
        broker: Running = iotcore.Broker(config_path=str(path))
        try:
            broker.start()
        except OSError as e:
            raise InputRejected(
                Reason.BAD_INPUT,
                f"{HOST}:{port} cannot be listened on ({e})",
                "choose another --port, or stop what holds it",
            ) from e
        except RuntimeError as e:
            raise TransferFailed(
                Reason.BROKER_UNREACHABLE, f"the embedded broker did not start: {e}", "choose another --port"
            ) from e
        return broker


def _package() -> ModuleType:
    try:
        import iotcore
    except ImportError as e:
        raise DeviceUnfit(
            Reason.RUNTIME_MISSING,
            f"the embedded broker is not installed ({e})",
            "install the extra: pip install 'edgeward[demo]', or use mosquitto",
        ) from e
    module: ModuleType = iotcore
    return module


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        number: int = probe.getsockname()[1]
    return number
