"""Real brokers for tests, on a free loopback port: mosquitto, and the embedded one of `edge-fleet broker`.

Not pytest: context managers with `host`, `port` and `address`, usable from scripts too.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from fleet import certificates

MOSQUITTO = "/usr/sbin/mosquitto"
EXAMPLE = Path(__file__).parents[2] / "examples" / "mosquitto"
HOST = "127.0.0.1"
_START_S = 10.0


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        number: int = probe.getsockname()[1]
    return number


class Mosquitto:
    """The real mosquitto: anonymous, MQTT 5, persistent in `folder`.

    `stop` ends it in order (its state is saved), `kill` does not; after either, `start` listens on the
    same port again.
    """

    def __init__(self, folder: Path, *, port: int = 0, extra: str = "") -> None:
        """`extra` is appended to its configuration."""
        self.host = HOST
        self.port = port or free_port()
        self._folder = folder / "mosquitto"
        self._config = self._folder / "mosquitto.conf"
        self._log = self._folder / "mosquitto.log"
        self._folder.mkdir(parents=True, exist_ok=True)
        # As root, mosquitto would drop to a user that cannot write here.
        self._config.write_text(
            f"listener {self.port} {self.host}\n"
            "allow_anonymous true\n"
            "user root\n"
            "persistence true\n"
            f"persistence_location {self._folder}/\n"
            "max_packet_size 1048576\n"
            f"{extra}\n"
        )
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"{self.host}:{self.port}"

    @property
    def log(self) -> str:
        """What it has said so far."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def start(self) -> Mosquitto:
        """Start and wait until it listens."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [MOSQUITTO, "-c", str(self._config), "-v"], stdout=log, stderr=subprocess.STDOUT
            )
        _await_listener(self._process, self.port, lambda: self.log)
        return self

    def stop(self) -> None:
        """End it in order; nothing happens when it has ended."""
        self._end("terminate")

    def kill(self) -> None:
        """End it with SIGKILL: what it has not saved is gone."""
        self._end("kill")

    def reload(self) -> None:
        """Read the files of rights and passwords anew."""
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    def restart(self) -> None:
        """Stop and start on the same port."""
        self.stop()
        self.start()

    def _end(self, how: str) -> None:
        process, self._process = self._process, None
        if process is not None:
            getattr(process, how)()
            process.wait(10)

    def __enter__(self) -> Mosquitto:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class SecureMosquitto(Mosquitto):
    """mosquitto as docs/broker.md sets it up: client certificates, and rights by their names."""

    def __init__(
        self, folder: Path, pki: Pki, *, tenant: str = "default", port: int = 0, extra: str = ""
    ) -> None:
        """`extra` is appended to its configuration."""
        super().__init__(folder, port=port, extra=extra)
        text = self._config.read_text().replace("allow_anonymous true", "allow_anonymous false")
        acl = self._folder / "acl"
        acl.write_text((EXAMPLE / "acl").read_text().replace("/default/", f"/{tenant}/"))
        server = pki.issue("broker", hosts=("localhost", HOST))
        tls = [
            line
            for line in (EXAMPLE / "mosquitto.conf").read_text().splitlines()
            if line.split(" ")[0] in ("require_certificate", "use_identity_as_username", "tls_version")
        ]
        files = {"cafile": pki.ca, "certfile": server.certificate, "keyfile": server.key, "acl_file": acl}
        self._config.write_text("\n".join([text, *tls, *(f"{k} {v}" for k, v in files.items())]) + "\n")


class Pki:
    """A CA in a folder, and certificates by name; made by `edge-fleet`'s own code."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.ca = certificates.init(folder, b"", days=30).certificate

    def issue(self, name: str, *, days: float = 30.0, hosts: tuple[str, ...] = ()) -> certificates.Issued:
        """A new certificate; the same name again replaces it."""
        return certificates.issue(self._folder, name, lambda: b"", days=days, hosts=hosts)


class Embedded:
    """The embedded broker, run as people run it: `edge-fleet broker`."""

    def __init__(self, *, port: int = 0) -> None:
        self.host = HOST
        self.port = port
        self._process: subprocess.Popen[str] | None = None

    @property
    def address(self) -> str:
        """HOST:PORT; the port is known once it runs."""
        return f"{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """Of the command, whose child the broker is."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> Embedded:
        """Start and wait for its ready line."""
        command = [sys.executable, "-c", "from fleet.cli import main; main()"]
        self._process = subprocess.Popen(
            [*command, "broker", "--json", "--port", str(self.port)], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"edge-fleet broker ended with {self._process.wait()}")
        self.port = int(json.loads(line)["broker"].rpartition(":")[2])
        return self

    def stop(self) -> int | None:
        """End it with SIGTERM; returns its exit code, also when it has ended already."""
        if self._process is not None:
            self._process.terminate()
        return self.wait(10)

    def wait(self, timeout_s: float) -> int | None:
        """Wait until it has ended by itself; returns its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        code = process.wait(timeout_s)
        if process.stdout is not None:
            process.stdout.close()
        return code

    def __enter__(self) -> Embedded:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _await_listener(process: subprocess.Popen[bytes], port: int, log: object) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            socket.create_connection((HOST, port), 0.2).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    process.kill()
    process.wait()
    raise RuntimeError(f"the broker does not listen on {port}: {log() if callable(log) else ''}")
