"""The control process: composes messaging, updates and telemetry, and runs the one loop they share.

Only composition and routing here. Everything below is owned by this loop's thread; the MQTT thread and
the children's readers hand values over through queues.
"""

from __future__ import annotations

import json
import logging
import queue
import signal
import time
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from edge_agent import facts, files, sdnotify
from edge_agent.config import Config
from edge_agent.inference import InferenceClient
from edge_agent.layout import Layout
from edge_agent.messaging.commands import Commands, Handler, text_argument
from edge_agent.messaging.link import Link
from edge_agent.messaging.mqtt import Message
from edge_agent.messaging.outbox import Outbox
from edge_agent.messaging.pace import ALERT, EVENT, NOTE, TELEMETRY
from edge_agent.messaging.throttle import Throttle
from edge_agent.sensors import METRICS, Sensors
from edge_agent.telemetry import Sampler
from edge_agent.update.children import Child
from edge_agent.update.clock import TrustedClock
from edge_agent.update.inbox import Inbox
from edge_agent.update.operators import OperatorKeys
from edge_agent.update.updater import Updater
from edge_contract import canonical, wire
from edge_contract.errors import (
    DeviceUnfit,
    EdgewardError,
    MessageRejected,
    Reason,
    StorageFault,
    TransferFailed,
)

log = logging.getLogger("edge_agent")

_TICK_S = 0.1
_LOOK_EVERY_MS = 1000
_EVENT_LIFE_S = 30 * 86400.0
_TELEMETRY_LIFE_S = 7 * 86400.0
# Everybody who may publish to this device can make it refuse something, so that is no alert.
_NO_ALERTS = frozenset({"refused"})
# Of what others wrote, or what went wrong: a longer text would push other events out of the outbox.
_DETAIL_CHARACTERS = 300
_MISTAKE_EVERY_MS = 60_000
# A flood of messages must not keep the rest of the loop from its turn.
_EVENTS_A_TURN = 200
_SESSIONS_A_START = 1_000_000
_BENCH_TIMEOUT_S = 300.0
_LOCK_PATIENCE_S = 0.5
_EARLY_COMMANDS = 4
# Signed by nobody we know yet: the keys may have been rotated, so such a message is looked at again.
_PERHAPS_NEW_KEYS = frozenset({Reason.UNSIGNED, Reason.SIGNATURE_INVALID})


def clock_ms() -> int:
    """Unix time in milliseconds; read once per turn of the loop."""
    return time.time_ns() // 1_000_000


def monotonic_ms() -> int:
    """For timers, which no step of the wall clock may stop."""
    return time.monotonic_ns() // 1_000_000


class App:
    """Complete once constructed; `run` returns after SIGTERM or SIGINT."""

    def __init__(self, config_path: Path, config: Config) -> None:
        now_ms = clock_ms()
        self._config = config
        self._layout = Layout(config)
        files.make_folder(self._layout.run)
        self._lock = _single_instance(self._layout)
        self._facts = facts.probe()
        self._throttle = Throttle()
        self._mistakes = Throttle(burst=1, every_ms=_MISTAKE_EVERY_MS)
        self._outbox = Outbox(
            self._layout.outbox,
            max_bytes=config.telemetry.outbox_max_bytes,
            now_ms=monotonic_ms(),
            stamp_ms=now_ms,
        )
        self._clock = TrustedClock(self._layout)
        self._operators = OperatorKeys(config_path, self._layout, self._say_storage)
        self._updater = Updater(config_path, config, self._report, now_ms)
        self._inference = InferenceClient(self._layout.control_socket)
        self._sampler = Sampler(Sensors(self._layout.state), self._inference, now_ms)
        session, problem = _session_base(self._layout)
        if problem:
            self._report(wire.Event(now_ms, "storage", reason=Reason.STORAGE_FAULT, detail=problem))
        self._link = Link(config, self._outbox, session, self._birth, clock_ms, self._say)
        handlers: dict[str, Handler] = {
            "status": self._on_status,
            "rollback": self._on_rollback,
            "bench": self._on_bench,
            "clear-rejected": self._on_clear_rejected,
        }
        self._commands = Commands(handlers, self._outbox, self._reply, self._link.topics.result)
        self._serving = False
        self._refused, self._refused_sha256 = "", ""
        self._held: Message | None = None
        self._early: list[Message] = []
        self._next_look_ms = self._next_import_ms = 0
        self._again_ms: int | None = None
        self._inbox = Inbox(self._layout)
        self._next_sample_ms = monotonic_ms() + int(config.telemetry.interval_s * 1000)
        self._stop = False

    def run(self) -> None:
        """The loop."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        self._link.start()
        log.info("control process of %s/%s is up", self._config.tenant, self._config.device)
        sdnotify.notify(sdnotify.READY)
        watchdog_s = sdnotify.watchdog_s()
        next_ping_s = time.monotonic()
        while not self._stop:
            self._receive()
            if self._stop:
                break  # what children do while everything ends is no verdict
            self._tick(clock_ms())
            if watchdog_s is not None and time.monotonic() >= next_ping_s:
                sdnotify.notify(sdnotify.WATCHDOG)
                next_ping_s = time.monotonic() + watchdog_s / 2
        sdnotify.notify(sdnotify.STOPPING)
        self._updater.stop()
        self._operators.stop()
        self._link.stop()
        self._outbox.close(monotonic_ms())

    def _on_signal(self, number: int, frame: Any) -> None:  # noqa: ARG002 - the signature is Python's
        self._stop = True

    def _receive(self) -> None:
        """Wait for the next thing, and take everything that is there."""
        try:
            event = self._link.inbox.get(timeout=_TICK_S)
        except queue.Empty:
            return
        for _ in range(_EVENTS_A_TURN):
            self._route(event, clock_ms())
            if self._link.inbox.empty():
                break
            event = self._link.inbox.get()
        self._store(clock_ms())

    def _route(self, event: Any, now_ms: int) -> bool:
        """Whether it was dealt with; what met a fault of the disk is held and looked at again."""
        try:
            if not isinstance(event, Message):
                self._link.handle(event, monotonic_ms())
            elif event.topic == self._link.topics.desired:
                self._desired(event, now_ms)
            elif event.topic == self._link.topics.command:
                self._command(event, now_ms)
            elif event.topic == self._link.topics.ack:
                self._link.acknowledge(event)
        except MessageRejected as e:
            self._refuse(event, e, now_ms)
        except StorageFault as e:
            log.error("%s", e)
            self._hold(event)
            return False
        except Exception as e:  # noqa: BLE001 - whoever sends it could end this process again and again
            self._mistake(f"taking {type(event).__name__}", e, now_ms)
        return True

    def _hold(self, event: Any) -> None:
        """The broker has delivered it, and may not do so again before the next connection."""
        if not isinstance(event, Message):
            return
        if event.topic == self._link.topics.desired:
            self._held = event
        elif event.topic == self._link.topics.command and len(self._early) < _EARLY_COMMANDS:
            self._early.append(event)
        self._again_ms = monotonic_ms() + _LOOK_EVERY_MS

    def _tick(self, now_ms: int) -> None:
        parts = (
            self._refresh_keys,
            self._take_imports,
            self._look,
            self._updater.tick,
            self._commands.tick,
            self._sample,
            self._speak,
        )
        for part in parts:
            try:
                part(now_ms)
            except StorageFault as e:
                # The disk may recover or be freed. The part keeps its old state, and the others go on:
                # a full disk must not keep a bad version from being reverted.
                log.error("%s", e)
            except Exception as e:  # noqa: BLE001 - nor may a mistake in telemetry, say
                self._mistake(part.__qualname__, e, now_ms)
            self._store(now_ms)

    def _store(self, now_ms: int) -> None:
        try:
            self._link.store(monotonic_ms())
        except Exception as e:  # noqa: BLE001 - as above
            self._mistake("the outbox", e, now_ms)

    def _mistake(self, part: str, error: Exception, now_ms: int) -> None:
        """A mistake in one part, or a fault that nobody foresaw: logged with its traceback, and reported.

        The next turn makes the same one, so both happen once in a while only.
        """
        dropped = self._mistakes.admit(part, monotonic_ms())
        if dropped is None:
            return
        detail = f"{part} failed: {type(error).__name__}: {error}"[:_DETAIL_CHARACTERS]
        log.error("%s (%d times before without a word)", detail, dropped, exc_info=error)
        self._report(wire.Event(now_ms, "fault", reason=Reason.DEVICE_UNFIT, detail=detail))

    def _refresh_keys(self, now_ms: int) -> None:
        refreshed = self._operators.tick(monotonic_ms())
        if refreshed:
            self._look_at_clock(now_ms)
        if not refreshed and (self._again_ms is None or monotonic_ms() < self._again_ms):
            return
        self._again_ms = None
        waiting = [*([self._held] if self._held else []), *self._early]
        self._held, self._early = None, []
        for message in waiting:
            self._route(message, now_ms)

    def _take_imports(self, now_ms: int) -> None:
        """An order that came by hand is believed by the same rules as one from the broker."""
        if monotonic_ms() < self._next_import_ms:
            return
        self._next_import_ms = monotonic_ms() + _LOOK_EVERY_MS
        arrived = self._inbox.look()
        if arrived is None:
            return
        if not self._operators.reload():
            return  # it lies where it is until it can be judged
        order = Message(self._link.topics.desired, arrived.desired, "", b"")
        if arrived.desired and not self._route(order, now_ms):
            return
        self._updater.hurry()
        self._inbox.done(arrived)

    def _look_at_clock(self, now_ms: int) -> None:
        for event in self._clock.look(now_ms):
            self._report(event)

    def _speak(self, now_ms: int) -> None:
        self._link.say_state(self._state(now_ms))
        self._link.tick(monotonic_ms())

    def _reply(self, topic: str, correlation: bytes, body: bytes) -> None:
        self._link.reply(topic, correlation, body, monotonic_ms())

    def _desired(self, message: Message, now_ms: int) -> None:
        if not message.payload:
            return  # the retained message was cleared: what was accepted stays
        if self._operators.keys is None and not self._operators.asked:
            self._held = message  # too early for a verdict: the registry is being asked for the keys
            return
        # It is retained, so the one that was accepted comes again on every connect, also when it has
        # expired since: the expiry is for those that are new to this device.
        desired = self._open(message, now_ms=0)
        if desired.generation > self._updater.adopted:
            if desired.generation > self._updater.generation:  # not one that was lost from the disk
                desired = self._open(message, self._clock.now_ms(now_ms))
            self._updater.accept(desired, now_ms)
            log.info("desired state of generation %d accepted", desired.generation)
        self._refused, self._refused_sha256, self._held = "", "", None

    def _open(self, message: Message, now_ms: int) -> wire.Desired:
        return wire.open_desired(
            message.payload,
            self._keys(),
            tenant=self._config.tenant,
            device=self._config.device,
            generation=self._updater.generation,
            now_ms=now_ms,
        )

    def _command(self, message: Message, now_ms: int) -> None:
        if self._operators.keys is None and not self._operators.asked and len(self._early) < _EARLY_COMMANDS:
            self._early.append(message)  # too early for a verdict, as above
            return
        command = wire.open_command(
            message.payload,
            self._keys(),
            tenant=self._config.tenant,
            device=self._config.device,
            now_ms=self._clock.now_ms(now_ms),
        )
        self._commands.take(message, command, now_ms)

    def _keys(self) -> wire.Operators:
        self._operators.reload()
        if self._operators.keys is None:
            raise MessageRejected(
                Reason.UNSIGNED,
                f"the operators' keys are not known yet ({self._operators.problem})",
                "nothing to do: the device asks the registry again and then looks at the message anew",
            )
        return self._operators.keys

    def _refuse(self, event: Any, error: MessageRejected, now_ms: int) -> None:
        """Report what was refused; what may only be signed by newer keys is held until they are fetched.

        A retained message comes again with every connect and every refresh of the keys: it is reported,
        and newer keys are asked for, once, or a forged one would keep this device busy for ever.
        """
        perhaps_new_keys = error.reason in _PERHAPS_NEW_KEYS
        if event.topic == self._link.topics.desired:
            self._held = event if perhaps_new_keys else None
            if not self._is_news(event, error):
                return
        if perhaps_new_keys:
            self._operators.ask(monotonic_ms())
        command = event.topic == self._link.topics.command
        label = f"{wire.label_of(event.payload)}: " if command else ""
        self._report(wire.Event(now_ms, "refused", reason=error.reason, detail=_brief(error, label)))

    def _is_news(self, message: Message, error: MessageRejected) -> bool:
        """Take the refusal into the reported state; says whether it was not there before."""
        sha256 = canonical.sha256_hex(message.payload)
        same = sha256 == self._refused_sha256 and f"[{error.reason.value}]" in self._refused
        self._refused, self._refused_sha256 = _brief(error), sha256
        return not same

    def _look(self, now_ms: int) -> None:
        """Does the inference process answer, and does it serve what the disk says?"""
        if monotonic_ms() < self._next_look_ms:
            return
        self._next_look_ms = monotonic_ms() + _LOOK_EVERY_MS
        self._look_at_clock(now_ms)
        try:
            loaded = self._inference.index()
            self._serving = True
        except TransferFailed:
            self._serving = False
            return
        self._updater.notice(loaded, now_ms)

    def _sample(self, now_ms: int) -> None:
        if monotonic_ms() < self._next_sample_ms:
            return
        self._next_sample_ms = monotonic_ms() + int(self._config.telemetry.interval_s * 1000)
        sample = self._sampler.sample(now_ms, serving=self._serving)
        self._outbox.put("tel", sample, priority=TELEMETRY, now_ms=monotonic_ms(), life_s=_TELEMETRY_LIFE_S)

    def _report(self, event: wire.Event) -> None:
        dropped = self._throttle.admit(f"{event.kind} {event.model}", monotonic_ms())
        if dropped is None:
            return  # the next one of its kind says how many there were
        log.info("%s %s %s [%s] %s", event.kind, event.model, event.version, event.reason.value, event.detail)
        if dropped:
            detail = f"{event.detail} (and {dropped} more of this kind before it)".strip()
            event = replace(event, detail=detail)
        alert = event.reason is not Reason.OK and event.kind not in _NO_ALERTS
        priority = ALERT if alert else NOTE if event.kind in _NO_ALERTS else EVENT
        self._outbox.put("event", event, priority=priority, now_ms=monotonic_ms(), life_s=_EVENT_LIFE_S)

    def _say(self, kind: str, reason: Reason, detail: str) -> None:
        self._report(wire.Event(clock_ms(), kind, reason=reason, detail=detail))

    def _say_storage(self, detail: str) -> None:
        self._say("storage", Reason.STORAGE_FAULT, detail)

    def _birth(self, session: int, now_ms: int) -> wire.Birth:
        return wire.Birth(1, session, self._facts, list(METRICS), now_ms)

    def _state(self, now_ms: int) -> wire.State:
        return wire.State(
            schema=1,
            generation=self._updater.generation,
            serving=self._serving,
            models=self._updater.views(),
            rejected=self._updater.rejected.digests(),
            at_ms=now_ms,
            refused=self._refused,
            refused_sha256=self._refused_sha256,
        )

    def _on_status(self, command: wire.Command) -> dict[str, Any]:  # noqa: ARG002 - a handler's shape
        state = json.loads(canonical.to_bytes(self._state(clock_ms())))
        return {"state": state, "facts": json.loads(canonical.to_bytes(self._facts))}

    def _on_rollback(self, command: wire.Command) -> dict[str, Any]:
        name = text_argument(command, "model")
        ref = self._updater.rollback(name, clock_ms())
        return {"model": name, "version": ref.version, "digest": ref.digest}

    def _on_clear_rejected(self, command: wire.Command) -> dict[str, Any]:  # noqa: ARG002 - a handler's shape
        return {"cleared": self._updater.rejected.clear()}

    def _on_bench(self, command: wire.Command) -> BenchWork:
        name = text_argument(command, "model")
        ref = self._updater.current(name)
        if ref is None:
            raise MessageRejected(
                Reason.UNKNOWN_MODEL, f"nothing serves as {name!r} here", "deploy it, then measure it"
            )
        return BenchWork(self._layout.version(ref.digest))


class BenchWork:
    """A benchmark of the serving version, in a child, for the `bench` command."""

    def __init__(self, folder: Path) -> None:
        self._child = Child(["bench", str(folder), "--json"], timeout_s=_BENCH_TIMEOUT_S)

    def poll(self) -> dict[str, Any] | None:
        """The report when it is there. Raises DeviceUnfit when the child failed."""
        ended = self._child.ended()
        if ended is None:
            return None
        if ended.code != 0:
            reason, detail = ended.failure()
            raise DeviceUnfit(reason, f"benchmark: {detail}", "try again when the device is less busy")
        return dict(ended.last)


def _brief(error: EdgewardError, label: str = "") -> str:
    """The error as text, its sentence cut: it may quote what a stranger sent."""
    rest = f" [{error.reason.value}] → {error.next_step}"
    room = max(0, _DETAIL_CHARACTERS - len(label) - len(rest))
    what = error.what if len(error.what) <= room else error.what[: max(0, room - 1)] + "…"
    return label + what + rest


def _single_instance(layout: Layout) -> int:
    deadline_s = time.monotonic() + _LOCK_PATIENCE_S
    try:
        files.make_folder(layout.state)
        path, lock = layout.control_lock, files.try_lock(layout.control_lock)
    except StorageFault as e:  # a disk that takes no new file must not keep the device silent
        log.error("%s; the lock is taken in run_dir instead", e.what)
        path = layout.run / layout.control_lock.name
        lock = files.try_lock(path)
    while lock is None and time.monotonic() < deadline_s:
        time.sleep(0.02)  # `edge-agent status` tries the lock for an instant
        lock = files.try_lock(path)
    if lock is None:
        raise DeviceUnfit(
            Reason.NOT_ALLOWED,
            f"another control process holds {path}",
            "stop it first, or give this one its own run_dir and state_dir",
        )
    return lock


def _session_base(layout: Layout) -> tuple[int, str]:
    """Session numbers grow with every start and every connection, so that a late will is told apart.

    Also says what is wrong with the disk. While it cannot be written, the count is kept in run_dir.
    """
    spare = layout.run / layout.session.name
    starts = max(_starts(layout.session), _starts(spare)) + 1
    data, problem = canonical.to_bytes({"starts": starts}), ""
    try:
        files.write(layout.session, data)
    except StorageFault as e:
        problem = e.what
        files.write(spare, data)
    return starts * _SESSIONS_A_START, problem


def _starts(path: Path) -> int:
    try:
        data = files.read(path)
        return int(json.loads(data)["starts"]) if data else 0
    except (ValueError, KeyError, TypeError, StorageFault):
        return clock_ms() // 1000  # damaged: any number above all earlier ones will do


def run(config_path: Path, config: Config) -> None:
    """The `edge-agent run` command."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(levelname)s %(message)s")
    try:
        App(config_path, config).run()
    except EdgewardError as e:
        sdnotify.notify(f"STATUS={e}")
        raise
