"""A device for fault tests: its processes started one by one, no broker, faults injected from outside.

The desired state is given on the disk, as a device finds it after a restart. What happens in the processes
is inject/sitecustomize.py's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from edge_agent import files, sealed, status
from edge_agent.config import Serving, Update
from edge_agent.layout import Layout
from edge_agent.update import journal
from edge_agent.update.journal import Entry, Ref
from edge_agent.update.store import Store
from edge_contract import wire
from tests.support.broker import free_port
from tests.support.device import TENANT, Device
from tests.support.http_registry import FolderServer
from tests.support.models import install, make_bundle, samples, scores
from tests.support.registry_folder import RegistryFolder
from tests.support.waiting import wait_for

NAME = "tiny"
X = samples(4)
INJECT = Path(__file__).parent / "inject"
NAMING = ("replace", "rename", "symlink", "link", "unlink", "mkdir", "rmdir", "exchange")
FORM_BYTES = 64 << 20  # for `prepared_max_bytes`
WRITING = ("open", "write", "fsync", "fdatasync", "syncfs")
# Operations after which something may be on the disk that was not there before.
DURABLE = (*NAMING, "fsync", "fdatasync", "syncfs")


class Plan(NamedTuple):
    """`fault`: KILL, STOP, NONE, SHORT (writes) or an errno's name; once at each point of `processes`.

    A point is an operation on a file in a state of the machine; with the grain `kind`, an operation.
    `only` is a path: nothing else is touched.
    """

    processes: Sequence[str]
    fault: str
    when: str = "before"
    operations: Sequence[str] = DURABLE
    grain: str = "point"
    only: str = ""


class Shelf:
    """Versions 1 to 3 of one model, published."""

    def __init__(self, folder: Path) -> None:
        self.registry = RegistryFolder.create(folder)
        self.versions = [
            make_bundle(folder, NAME, f"{n}.0.0", n, seed=n, padding_bytes=20_000 + n) for n in (1, 2, 3)
        ]
        for bundle in self.versions:
            self.registry.publish(bundle)


class Rig:
    """Version 2 serves, version 1 did before; `want` orders another one."""

    def __init__(
        self,
        shelf: Shelf,
        *,
        prepare: Callable[[Path], object] = lambda _: None,
        shipped: bool = False,
        **update: Any,
    ) -> None:
        """`prepare` gets the state folder before anything is in it; `update` are settings of [update].

        A device here never gives up, however often it is killed, and without settings that allow it makes no
        prepared forms: an idle one would be at work. `shipped` gives up and prepares as the defaults say.
        """
        self.shelf = shelf
        self.server = FolderServer(shelf.registry.folder)
        self.server.start()
        settings = {
            "update": {
                "probation_s": 0.2,
                "probation_max_s": 15.0,
                "retry_s": 0.05,
                "retry_max_s": 0.2,
                "recheck_s": 3600.0,
                "max_attempts": Update().max_attempts if shipped else 1000,
                "prepared_max_bytes": Update().prepared_max_bytes if shipped else 0,
                **update,
            },
            "broker": {"reconnect_max_s": 60.0},
            "serving": {
                "drain_timeout_s": 1.0,
                "max_failed_starts": Serving().max_failed_starts if shipped else 1000,
            },
        }
        self.device = Device(
            "rig",
            broker=free_port(),
            registry_url=self.server.url,
            root=shelf.registry.root,
            settings=settings,
        )
        self.layout: Layout = self.device.layout
        self.done_path = self.device.folder / "done"
        self.done_path.touch()
        self.layout.state.mkdir()
        prepare(self.layout.state)
        self.store = Store(self.layout)
        self.generation = 1
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._plan: Plan | None = None
        install(shelf.versions[0], self.layout, "previous")
        install(shelf.versions[1], self.layout, "current")

    # what it is told

    def want(self, number: int) -> None:
        """Put the desired state on the disk; the control process reads it at its next start."""
        bundle = self.shelf.versions[number - 1]
        self.generation += 1
        model = wire.DesiredModel(bundle.manifest.name, bundle.manifest.version, bundle.digest)
        desired = wire.Desired(1, TENANT, "rig", self.generation, 0, 10**15, [model])
        sealed.write(self.layout.desired, desired)

    def put_in_state(self, **fields: Any) -> None:
        """Write the journal as a kill may have left it on the way from version 2 to 3."""
        v1, v2, v3 = (Ref(b.manifest.version, b.digest) for b in self.shelf.versions)
        values = {
            "generation": self.generation,
            "target": v3,
            "base": v2,
            "older": v1,
            "attempts": 1,
        } | fields
        journal.save(self.layout, Entry(schema=1, name=NAME, **values))

    def plan(self, plan: Plan | None, done: Sequence[str] = ()) -> None:
        """What is to happen in processes that are started from now on; not again at the points of `done`."""
        self._plan = plan
        self.done_path.write_text("".join(f"{point}\n" for point in done))

    # its processes

    def start(self, command: str) -> None:
        """Start `edge-agent run` or `serve`."""
        environment = dict(os.environ)
        if self._plan is not None:
            environment["PYTHONPATH"] = f"{INJECT}:{Path.cwd()}"
            environment["EDGEWARD_FAULTS"] = json.dumps(
                self._plan._asdict()
                | {"root": str(self.layout.state), "done": str(self.done_path), "model": NAME}
            )
        with self.device.log_path.open("ab") as log:
            self._processes[command] = subprocess.Popen(
                [sys.executable, "-m", "edge_agent", command, "--config", str(self.device.config_path)],
                stdout=log,
                stderr=log,
                env=environment,
            )
        if command == "serve" and (self._plan is None or "serve" not in self._plan.processes):
            self.device.wait_serving()

    def stopped(self) -> list[int]:
        """Processes of this device that have stopped themselves."""
        return [pid for pid in self.device.pids() if _is_stopped(pid)]

    def ended(self, command: str) -> int | None:
        """The exit code, or None while it runs."""
        return self._processes[command].poll()

    def pid(self, command: str) -> int:
        """Of a process that was started."""
        return self._processes[command].pid

    def end(self, command: str, number: int = signal.SIGKILL) -> None:
        """Signal a process and wait."""
        process = self._processes.pop(command, None)
        if process is not None and process.poll() is None:
            process.send_signal(number)
            process.wait(20)

    def close(self) -> None:
        """End everything."""
        for command in list(self._processes):
            self.end(command)
        self.server.stop()
        wait_for(lambda: not self.device.pids(), "the end of all children")
        self.device.close()

    # what it says

    @property
    def hit(self) -> list[str]:
        """The points at which something was provoked, in their order."""
        return self.done_path.read_text().splitlines()

    @property
    def entry(self) -> Entry:
        """The journal's entry."""
        found = sealed.read(self.layout.journal_file(NAME), Entry)
        return found or Entry(schema=1, name=NAME)

    @property
    def settled(self) -> bool:
        """Whether the attempt of the newest generation is over, and nothing is left to be removed."""
        entry = self.entry
        over = entry.state == "idle" and entry.settled_generation == self.generation
        named = {digest for digest in self.store.named(NAME) if digest}
        return over and set(files.names(self.layout.store)) == named

    def serving_seed(self) -> int:
        """Which version's answers it gives, compared with answers that no runtime computed."""
        answers = self.device.scores(NAME, X)
        for seed in range(1, 4):
            if np.allclose(answers, scores(X, seed=seed), rtol=1e-4):
                return seed
        raise AssertionError(f"answers of no version: {answers}")

    def serves(self) -> bool:
        """Whether the inference process answers now."""
        with suppress(OSError), self.device.client(1.0) as client:
            return client.request("GET", "/v2/health/live").status == 200
        return False

    def assert_answers_among(self, *seeds: int) -> None:
        """The inference process answers as one of these versions does."""
        self.device.wait_serving()
        assert self.serving_seed() in seeds

    def told(self) -> dict[str, Any]:
        """What `edge-agent status` says of the model."""
        (told,) = status.collect(self.device.config)["models"]
        return dict(told)

    def assert_whole(self, *allowed: int) -> None:
        """What the links name is whole in the store, and current is one of these versions."""
        current, previous = self.store.named(NAME)
        assert current in {self.shelf.versions[n - 1].digest for n in allowed}
        assert self.store.has(current)
        assert previous is None or self.store.has(previous)

    def assert_sound(self, *allowed: int) -> None:
        """The disk names a whole version, one of these serves, and the status tells which."""
        self.assert_whole(*allowed)
        self.device.wait_serving()
        # A swap may come between two looks; then the next two agree.
        wait_for(lambda: self._told(self.serving_seed()) in allowed, "status and answers to agree")

    def _told(self, seed: int) -> int:
        """The version of the answers, if the status says the same of what serves, disk and journal."""
        before = self.entry.state.value, self.store.named(NAME)[0]
        told = self.told()
        serves = told["serves"] and told["serves"]["version"]
        digest = self.shelf.versions[int(told["current"][0]) - 1].digest
        return seed if (serves, (told["state"], digest)) == (f"{seed}.0.0", before) else 0

    def assert_complete(self, current: int, previous: int | None) -> None:
        """The end: links, store, journal, answers and status agree, and nothing is left lying about."""
        digests = [self.shelf.versions[n - 1].digest for n in (current, previous) if n]
        assert [d for d in self.store.named(NAME) if d] == digests
        assert files.names(self.layout.store) == sorted(digests)
        self.assert_sound(current)
        wait_for(lambda: not self._lying_about(), "nothing to be left lying about")
        assert "Traceback" not in self.device.log

    def _lying_about(self) -> list[Path]:
        ends = (".tmp", ".building")
        return [p for p in self.layout.state.rglob("*") if p.name.endswith(ends) and "trust" not in p.parts]

    def until(self, look: Any, what: str, timeout_s: float = 60.0) -> Any:
        """`wait_for` with the log of the device in the message."""
        try:
            return wait_for(look, what, timeout_s=timeout_s, every_s=0.01)
        except AssertionError as e:
            raise AssertionError(
                f"{e}\nhit: {self.hit}\nentry: {self.entry}\n{self.device.log[-3000:]}"
            ) from e

    def points(self, timeout_s: float = 100.0) -> Iterator[str]:
        """Run the control process until the attempt is over; yields at each point that was hit.

        Whatever was killed is started again after the yield: control and inference process here, children by
        the control process.
        """
        deadline_s = time.monotonic() + timeout_s
        told = 0
        self.start("run")
        while True:
            self.until(partial(self._anything_new, told), "a point or the end")
            assert time.monotonic() < deadline_s, f"no end; hit: {self.hit}\n{self.device.log[-3000:]}"
            hit = self.hit
            fallen = self._fallen()
            if fallen and len(hit) == told:
                raise AssertionError(f"{fallen} ended by itself:\n{self.device.log[-3000:]}")
            for command in self._await_fall(hit[told:]):
                self.start(command)
            yield from hit[told:]
            told = len(hit)
            if self.settled and not self._fallen() and len(self.hit) == told:
                return

    def _anything_new(self, told: int) -> bool:
        return len(self.hit) > told or self.settled or bool(self._fallen())

    def _has_ended(self, command: str) -> bool:
        return self.ended(command) is not None

    def _fallen(self) -> list[str]:
        return [command for command in self._processes if self.ended(command) is not None]

    def _await_fall(self, new: list[str]) -> list[str]:
        """The processes of these points, once they are dead; those that others start are not among them."""
        if self._plan is None or self._plan.fault != "KILL":
            return []
        commands = {point.partition(":")[0].partition(" ")[0] for point in new} & set(self._processes)
        for command in commands:
            self.until(partial(self._has_ended, command), f"the end of {command}", 10)
        return sorted(commands)

    def __enter__(self) -> Rig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            print(self.device.log)
        self.close()


def _is_stopped(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False
