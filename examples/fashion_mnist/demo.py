"""`make demo`: the whole job of Edgeward on real data, with the real programs, on this machine.

Optimizes two real nets, signs and publishes them, deploys to a running device over MQTT, classifies test
images over HTTP, swaps versions under load, and tries to break the device in four ways. It ends with a
table, one row per promise, and exits 1 if any row fails. It leaves nothing running; its files, reports
among them, stay in build/demo.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paho.mqtt.client as paho
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from demo_tools import (
    BIN,
    Classifier,
    Load,
    Processes,
    StepFailed,
    flip_byte,
    free_port,
    recast,
    wait_for_port,
)
from paho.mqtt.enums import CallbackAPIVersion
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edge_contract import dsse, wire
from edge_contract import manifest as m

HERE = Path(__file__).parent
DEVICE, TENANT, MODEL = "demo-box", "demo", "fashion"
PASSWORD_VARIABLE = "EDGEWARD_KEY_PASSWORD"  # noqa: S105 - a name, not a password

CONFIG = """\
tenant = "{tenant}"
device = "{device}"
state_dir = "{work}/device/state"
run_dir = "{run}"

[broker]
host = "{broker_host}"
port = {broker_port}

[registry]
url = "http://127.0.0.1:{registry_port}"
root = "{work}/registry/root.json"

[serving]
tcp = "127.0.0.1:{http_port}"

[update]
probation_s = {probation_s}
probation_min_requests = {probation_min_requests}
retry_s = 2.0

[telemetry]
interval_s = 2.0
"""


class Demo:
    """The steps share what earlier ones made."""

    def __init__(
        self, work: Path, console: Console, *, probation_s: float = 4.0, probation_min_requests: int = 200
    ) -> None:
        self.console = console
        self.probation = {"probation_s": probation_s, "probation_min_requests": probation_min_requests}
        self.work = work
        self.run_dir = Path("/tmp") / f"edgeward-{secrets.token_hex(4)}"  # noqa: S108 - socket paths are short
        (work / "logs").mkdir(parents=True)
        self.processes = Processes(work / "logs")
        self.processes.environment[PASSWORD_VARIABLE] = secrets.token_urlsafe(12)
        self.http_port, self.registry_port = free_port(), free_port()
        self.broker_host, self.broker_port = _given_broker() or ("127.0.0.1", free_port())
        self.own_broker = _given_broker() is None
        with np.load(HERE / "test.npz") as data:
            self.images, self.labels = data["image"], data["label"]
        self.rows: list[tuple[str, str, bool]] = []

    # --- the steps, in order -------------------------------------------------------------------

    def optimize_first(self) -> str:
        """The small net, for two kinds of device."""
        told = []
        for profile in ("raspberry-pi-4", "x86-64-vnni"):
            told.append(f"{profile}: {self.optimize(HERE / 'mobilenet.onnx', profile, 1)}")
        if self.local_profile() not in ("raspberry-pi-4", "x86-64-vnni"):
            self.optimize(HERE / "mobilenet.onnx", self.local_profile(), 1)
        return "; ".join(told)

    def publish_first(self) -> str:
        """Keys, a signed registry, version 1 in it."""
        registry = self.work / "registry"
        self.processes.run("edge-fleet", "registry", "init", registry, "--keys", self.work / "keys")
        self.publish(self.bundle("mobilenet", self.local_profile()))
        signed = sorted(p.name for p in (registry / "metadata").iterdir())
        return f"signed metadata: {', '.join(signed)}"

    def start_device(self) -> str:
        """Broker, registry server, and the device's two processes."""
        if self.own_broker:
            self.processes.start("broker", "edge-fleet", "broker", "--port", self.broker_port)
        wait_for_port(self.broker_port, "the broker")
        registry = ("registry", "serve", self.work / "registry", "--port", self.registry_port)
        self.processes.start("registry", "edge-fleet", *registry)
        wait_for_port(self.registry_port, "the registry")
        config = self.work / "agent.toml"
        config.write_text(
            CONFIG.format(
                tenant=TENANT,
                device=DEVICE,
                work=self.work,
                run=self.run_dir,
                broker_host=self.broker_host,
                broker_port=self.broker_port,
                registry_port=self.registry_port,
                http_port=self.http_port,
                **self.probation,
            )
        )
        self.processes.start("device", "edge-agent", "up", "--config", config)
        wait_for_port(self.http_port, "the device")
        return self._wait("the device to come online", self._online)

    def deploy_first(self) -> str:
        """Version 1 by an MQTT message; nothing served before it."""
        # There is no traffic yet, so probation ends on time with what it has seen.
        with Load(self.http_port, MODEL, self.images, self.labels, clients=1) as load:
            self.deploy("1")
        return f"committed; {load.answered} answers during probation"

    def classify(self) -> str:
        """2,000 labelled test images over HTTP."""
        client = Classifier(self.http_port, MODEL)
        right, times = 0, []
        for i in range(len(self.images)):
            started_s = time.perf_counter()
            right += int(client.classify(self.images[i : i + 1])[0] == self.labels[i])
            times.append((time.perf_counter() - started_s) * 1000)
        client.close()
        accuracy = right / len(self.images)
        if accuracy < 0.88:
            raise StepFailed(f"top-1 {accuracy:.2%} on the test images, 88 % expected of this net")
        p50, p95 = np.percentile(times, [50, 95])
        return f"top-1 {accuracy:.2%} of {len(self.images)} images; p50 {p50:.2f} ms, p95 {p95:.2f} ms"

    def swap_under_load(self) -> str:
        """The better net replaces the small one while four clients keep asking."""
        self.optimize(HERE / "resnet8.onnx", self.local_profile(), 2)
        self.publish(self.bundle("resnet8", self.local_profile()))
        with Load(self.http_port, MODEL, self.images, self.labels) as load:
            time.sleep(2)
            before_s = time.monotonic()
            self.deploy("2")
            after_s = time.monotonic()
            time.sleep(2)
            end_s = time.monotonic()
        if load.failures:
            raise StepFailed(f"{len(load.failures)} requests failed, the first: {load.failures[0]}")
        before, after = load.accuracy(0, before_s), load.accuracy(after_s, end_s)
        if not after > before:
            raise StepFailed(f"accuracy {before:.2%} before and {after:.2%} after")
        return f"0 of {load.answered} requests failed; top-1 {before:.1%} → {after:.1%}"

    def refuse_wrong_weights(self) -> str:
        """Version 3: signed and whole, but not the weights that were tested."""
        broken = self._break("one-class")
        good = self.bundle("resnet8", self.local_profile())
        self.publish(recast(good, self.work / "wrong-weights", "3", 3, broken.read_bytes()))
        result = self.deploy("3", expect=3)
        return self._rejected(result, "failed", "golden_mismatch")

    def revert_wrong_decisions(self) -> str:
        """Version 4: a broken net that was optimized and tested as if it were right."""
        self.optimize(self._break("one-class"), self.local_profile(), 4)
        self.publish(self.bundle("broken", self.local_profile()))
        with Load(self.http_port, MODEL, self.images, self.labels) as load:
            result = self.deploy("4", expect=3)
        if load.failures:
            raise StepFailed(f"{len(load.failures)} requests failed, the first: {load.failures[0]}")
        return self._rejected(result, "reverted", "output_drift")

    def refuse_tampered_blob(self) -> str:
        """Version 5: one byte of its model changed in the registry after signing."""
        shuffled = self._break("shuffled").read_bytes()
        good = self.bundle("resnet8", self.local_profile())
        # Only whole: a patch or a compressed form would bring the right bytes and not notice.
        bundle = self.publish(recast(good, self.work / "tampered", "5", 5, shuffled), "--delta-from", "none")
        manifest = m.from_bytes((bundle / "manifest.json").read_bytes())
        flip_byte(self.work / "registry" / m.blob_path(manifest.file("model").sha256))
        result = self.deploy("5", expect=3)
        return self._rejected(result, "failed", "digest_mismatch")

    def refuse_unsigned(self) -> str:
        """Somebody on the broker without the operator's key."""
        topics = wire.Topics(TENANT, DEVICE)
        order = {"schema": 1, "tenant": TENANT, "device": DEVICE, "generation": 99, "models": []}
        order |= {"issued_ms": 0, "expires_ms": 1 << 50}
        stranger = Ed25519PrivateKey.generate()
        self._shout(topics.command, dsse.sign(b"{}", wire.COMMAND_TYPE, []))
        self._shout(topics.desired, dsse.sign(json.dumps(order).encode(), wire.DESIRED_TYPE, [stranger]))
        return self._wait("the refusal to be reported", self._refusal)

    def still_serves(self) -> str:
        """After all that: version 2, right answers."""
        status = self.processes.run("edge-agent", "status", "--config", self.work / "agent.toml", "--json")
        (model,) = status.json()["models"]
        serves = model["serves"]["version"] if model["serves"] else None
        client = Classifier(self.http_port, MODEL)
        answers = np.concatenate([client.classify(part) for part in np.split(self.images[:1000], 20)])
        client.close()
        accuracy = float((answers == self.labels[:1000]).mean())
        if (serves, model["current"]) != ("2", "2") or accuracy < 0.9:
            raise StepFailed(f"serves {serves}, disk says {model['current']}, top-1 {accuracy:.2%}")
        return f"version {serves} serves and the disk says so; top-1 {accuracy:.1%}"

    def telemetry(self) -> str:
        """What the operator saw meanwhile."""
        arguments = ("watch", *self._bus(), "--device", DEVICE, "--json", "--for-s", "6")
        watched = self.processes.run("edge-fleet", *arguments, "--db", self.work / "fleet.db")
        rows = [json.loads(line) for line in watched.out.splitlines() if line.startswith("{")]
        samples = [r["payload"] for r in rows if r.get("stream") == "tel"]
        busy = [(v["requests"], s, v) for s in samples for v in s["models"] if v["requests"]]
        if not busy:
            raise StepFailed("no telemetry with requests arrived")
        _, busiest, served = max(busy, key=lambda row: row[0])
        device = busiest["device"]
        return (
            f"{len(samples)} samples, {len(rows) - len(samples)} events; busiest: "
            f"{served['name']}@{served['version']} {served['rate_per_s']:.0f} requests/s, "
            f"p95 {served['p95_ms']:.2f} ms, CPU {device['cpu_percent']:.0f} %, "
            f"memory {device['memory_percent']:.0f} %"
        )

    # --- what the steps are made of ------------------------------------------------------------

    def optimize(self, model: Path, profile: str, release: int) -> str:
        """Optimize a model into a bundle; says what was chosen."""
        output = self.work / "optimized" / f"{model.stem}-{profile}"
        splits = [f for s in ("calibration", "selection", "test") for f in (f"--{s}", HERE / f"{s}.npz")]
        named = ("--name", MODEL, "--model-version", release, "--release", release)
        arguments = ("run", model, "--profile", profile, *splits, *named, "--output", output, "--json")
        self.processes.run("edge-optimize", *arguments)
        report = json.loads((output / "report.json").read_text())
        self.console.print(f"    [dim]{output.relative_to(self.work)}/report.html[/dim]")
        return _choice(report)

    def bundle(self, stem: str, profile: str) -> Path:
        """Where `optimize` put it."""
        return self.work / "optimized" / f"{stem}-{profile}" / "bundle"

    def publish(self, bundle: Path, *options: str) -> Path:
        """Sign and publish a bundle; returns it."""
        keys = ("--keys", self.work / "keys", *options)
        self.processes.run("edge-fleet", "registry", "publish", self.work / "registry", bundle, *keys)
        return bundle

    def deploy(self, version: str, expect: int = 0, *, downgrade: bool = False) -> dict[str, Any]:
        """Deploy a version and follow the device; returns what it said."""
        where = ("--registry", self.work / "registry", "--keys", self.work / "keys", *self._bus())
        arguments = (
            "deploy",
            f"{MODEL}@{version}",
            "--device",
            DEVICE,
            *where,
            "--timeout-s",
            "90",
            *(["--allow-downgrade"] if downgrade else []),
            "--json",
        )
        result = self.processes.run("edge-fleet", *arguments, expect=expect).json()
        return dict(result["devices"][0])

    def _rejected(self, device: dict[str, Any], outcome: str, reason: str) -> str:
        if (device["outcome"], device["reason"]) != (outcome, reason):
            raise StepFailed(f"expected {outcome} by {reason}, the device said {device}")
        return f"{outcome} [{reason}] {_short(device['detail'])}"

    def _break(self, fault: str) -> Path:
        target = self.work / ("broken.onnx" if fault == "one-class" else f"{fault}.onnx")
        if not target.exists():
            script = HERE / "make_broken.py"
            self.processes.run("python", script, HERE / "resnet8.onnx", target, "--fault", fault)
        return target

    def _bus(self) -> tuple[str, ...]:
        return ("--broker", f"{self.broker_host}:{self.broker_port}", "--tenant", TENANT)

    def _devices(self) -> list[dict[str, Any]]:
        found = self.processes.run("edge-fleet", "devices", *self._bus(), "--json").json()
        return list(found["devices"])

    def _online(self) -> str:
        box = next((d for d in self._devices() if d["device"] == DEVICE), None)
        if box is None or not box["online"] or not box["serving"]:
            return ""
        return f"{DEVICE} online: {box['facts']['architecture']}, {box['facts']['cores']} cores"

    def _refusal(self) -> str:
        box = next(d for d in self._devices() if d["device"] == DEVICE)
        return _short(box["refused"]) if "[unsigned]" in box["refused"] else ""

    def _wait(self, what: str, look: Callable[[], str], timeout_s: float = 30) -> str:
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if found := look():
                return found
            time.sleep(0.5)
        raise StepFailed(f"waited {timeout_s:.0f} s for {what}")

    def _shout(self, topic: str, payload: bytes) -> None:
        client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        client.connect(self.broker_host, self.broker_port)
        client.loop_start()
        client.publish(topic, payload, qos=1).wait_for_publish(10)
        client.disconnect()
        client.loop_stop()

    def local_profile(self) -> str:
        """The profile of the machine this runs on."""
        if platform.machine() == "aarch64":
            return "generic-arm64"
        cpuinfo = Path("/proc/cpuinfo").read_text()
        return "x86-64-vnni" if "avx512_vnni" in cpuinfo else "generic-x86-64"


STEPS: list[tuple[str, Callable[[Demo], str]]] = [
    ("optimize a net for two devices", Demo.optimize_first),
    ("sign and publish version 1", Demo.publish_first),
    ("start broker, registry, device", Demo.start_device),
    ("deploy version 1 over MQTT", Demo.deploy_first),
    ("classify test images over HTTP", Demo.classify),
    ("swap in version 2 under load", Demo.swap_under_load),
    ("refuse wrong weights (version 3)", Demo.refuse_wrong_weights),
    ("revert wrong decisions (version 4)", Demo.revert_wrong_decisions),
    ("refuse a tampered blob (version 5)", Demo.refuse_tampered_blob),
    ("refuse unsigned messages", Demo.refuse_unsigned),
    ("still serve version 2", Demo.still_serves),
    ("show telemetry", Demo.telemetry),
]


def main() -> int:
    """Run every step; the table at the end says which of them held."""
    console = Console(width=max(100, Console().width))
    console.print("Files, reports among them, go to build/demo.")
    work = HERE.parent.parent / "build" / "demo"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    started_s = time.monotonic()
    demo = Demo(work, console)
    rows: list[tuple[str, str, bool, float]] = []
    try:
        for number, (title, step) in enumerate(STEPS, 1):
            at_s = time.monotonic()
            with console.status(f"{number}/{len(STEPS)} {title}"):
                told, held = _attempt(demo, step)
            rows.append((title, told, held, time.monotonic() - at_s))
            console.print(f"{_mark(held)} {number}/{len(STEPS)} {title}: {escape(told)}", highlight=False)
            if not held and number <= 4:
                break  # nothing after it could hold
    finally:
        demo.processes.end()
        shutil.rmtree(demo.run_dir, ignore_errors=True)
    _table(console, rows, time.monotonic() - started_s)
    held = len(rows) == len(STEPS) and all(row[2] for row in rows)
    if not held:
        console.print(f"[red]Not every row holds.[/red] The programs' logs are in {work}/logs.")
    return 0 if held else 1


def _attempt(demo: Demo, step: Callable[[Demo], str]) -> tuple[str, bool]:
    try:
        return step(demo), True
    except StepFailed as e:
        return str(e), False
    except Exception as e:  # noqa: BLE001 - the demo goes on to its table, whatever a step met
        (demo.work / "logs" / "demo.log").write_text(traceback.format_exc())
        return f"{type(e).__name__}: {e}", False


def _choice(report: dict[str, Any]) -> str:
    """`static_int8_minmax, 41 kB, 1.52× FP32's latency here, top-1 91.4 % (FP32 91.3 %)`."""
    name, test = report["outcome"]["name"], report["test"]
    measured = next(c["measured"] for c in report["candidates"] if c["name"] == name)
    return (
        f"{name} decided by {report['outcome']['decided_by']}: {measured['size_bytes'] / 1000:.0f} kB, "
        f"{measured['ratio']:.2f}× FP32's latency on this machine, "
        f"test top-1 {test['value']:.1%} (FP32 {test['fp32_value']:.1%})"
    )


def _table(console: Console, rows: list[tuple[str, str, bool, float]], seconds: float) -> None:
    table = Table(title=f"Edgeward, end to end, in {seconds:.0f} s", title_justify="left", show_lines=True)
    table.add_column("")
    table.add_column("step")
    table.add_column("what was seen")
    table.add_column("s", justify="right")
    for title, told, held, took_s in rows:
        table.add_row(_mark(held), title, escape(told), f"{took_s:.0f}")
    console.print(table)


def _mark(held: bool) -> str:
    return "[green]✓[/green]" if held else "[red]✗[/red]"


def _short(text: str, limit: int = 220) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _given_broker() -> tuple[str, int] | None:
    """`EDGEWARD_BROKER=host:port` names a broker that runs already, such as a real mosquitto."""
    given = os.environ.get("EDGEWARD_BROKER", "")
    if not given:
        return None
    host, _, port = given.rpartition(":")
    return host or "127.0.0.1", int(port)


if __name__ == "__main__":
    if not (BIN / "edge-agent").exists():
        sys.exit("demo: run it as `make demo`, which installs the programs first")
    sys.exit(main())
