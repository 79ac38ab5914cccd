"""Commands: dispatched once, answered every time, in the right place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from edge_agent.messaging.commands import Commands, text_argument
from edge_agent.messaging.mqtt import Message
from edge_agent.messaging.outbox import Outbox
from edge_contract import wire
from edge_contract.errors import DeviceUnfit, MessageRejected, Reason, StorageFault

TOPICS = wire.Topics("acme", "line-3")
MESSAGE = Message(TOPICS.command, b"", f"{TOPICS.result}/someone", b"\x01correlation")


class Reply(NamedTuple):
    topic: str
    correlation: bytes
    result: wire.Result


class Slow:
    """Work that is done when told."""

    def __init__(self) -> None:
        self.data: dict[str, Any] | None = None
        self.error: DeviceUnfit | None = None

    def poll(self) -> dict[str, Any] | None:
        if self.error is not None:
            raise self.error
        return self.data


class Device:
    """Commands over a real outbox, with handlers that count."""

    def __init__(self, path: Path) -> None:
        self.outbox = Outbox(path, max_bytes=1 << 20, now_ms=0, stamp_ms=0)
        self.replies: list[Reply] = []
        self.calls: list[str] = []
        self.slow = Slow()
        self.commands = Commands(
            {"status": self.status, "rollback": self.rollback, "bench": self.bench},
            self.outbox,
            lambda topic, correlation, body: self.replies.append(
                Reply(topic, correlation, wire.decode(body, wire.Result))
            ),
            TOPICS.result,
        )

    def status(self, command: wire.Command) -> dict[str, Any]:
        self.calls.append(command.id)
        return {"calls": len(self.calls)}

    def rollback(self, command: wire.Command) -> dict[str, Any]:
        self.calls.append(command.id)
        raise MessageRejected(Reason.NO_PREVIOUS, "there is nothing before", "deploy instead")

    def bench(self, command: wire.Command) -> Slow:
        self.calls.append(command.id)
        return self.slow

    def take(self, name: wire.CommandName, id_: str, message: Message = MESSAGE, now_ms: int = 5) -> None:
        command = wire.Command(1, "acme", "line-3", id_, name, 0, 10**15)
        self.commands.take(message, command, now_ms)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    device = Device(tmp_path / "outbox.db")
    yield device
    device.outbox.close(0)


def test_an_answer_goes_where_it_was_asked_for_with_its_correlation(device: Device) -> None:
    device.take("status", "a")
    result = wire.Result(1, "a", True, Reason.OK, "done", "", 5, {"calls": 1})
    assert device.replies == [Reply(f"{TOPICS.result}/someone", b"\x01correlation", result)]


@pytest.mark.parametrize(
    "asked",
    [
        "",
        TOPICS.result,
        "edge/v1/acme/other/down/desired",
        TOPICS.desired,
        TOPICS.result + "x",
        "$SYS/broker",
    ],
)
def test_answers_stay_below_the_devices_own_result_topic(device: Device, asked: str) -> None:
    device.take("status", "a", MESSAGE._replace(response_topic=asked))
    assert device.replies[0].topic == TOPICS.result


def test_the_same_id_again_gets_the_same_answer_and_does_nothing(device: Device, tmp_path: Path) -> None:
    device.take("status", "a")
    device.take("status", "a", MESSAGE._replace(correlation=b"2"), now_ms=99)
    assert device.calls == ["a"]
    assert [r.result for r in device.replies] == [device.replies[0].result] * 2
    assert device.replies[1].correlation == b"2"
    device.outbox.close(0)

    restarted = Device(tmp_path / "outbox.db")
    restarted.take("status", "a")
    assert restarted.calls == []
    assert restarted.replies[0].result == device.replies[0].result
    restarted.take("status", "b")
    assert restarted.calls == ["b"]
    restarted.outbox.close(0)


def test_a_refusal_is_an_answer_and_is_kept_like_one(device: Device) -> None:
    for _ in range(2):
        device.take("rollback", "a")
    assert device.calls == ["a"]
    result = wire.Result(1, "a", False, Reason.NO_PREVIOUS, "there is nothing before", "deploy instead", 5)
    assert [r.result for r in device.replies] == [result] * 2


def test_slow_work_is_answered_once_when_it_is_done(device: Device) -> None:
    device.take("bench", "a")
    device.take("bench", "a")
    device.commands.tick(6)
    assert device.replies == []
    device.slow.data = {"p50_ms": 1.5}
    device.commands.tick(7)
    device.commands.tick(8)
    assert device.calls == ["a"]
    assert [r.result for r in device.replies] == [
        wire.Result(1, "a", True, Reason.OK, "done", "", 7, {"p50_ms": 1.5})
    ]
    device.take("bench", "a")
    assert len(device.replies) == 2


def test_slow_work_that_fails_is_answered_and_holds_up_nothing(device: Device) -> None:
    device.take("bench", "a")
    device.slow.error = DeviceUnfit(Reason.CANDIDATE_HUNG, "it hung", "later")
    device.commands.tick(7)
    device.take("status", "b")
    assert [(r.result.id, r.result.ok, r.result.reason) for r in device.replies] == [
        ("a", False, Reason.CANDIDATE_HUNG),
        ("b", True, Reason.OK),
    ]


def test_a_mistake_in_a_handler_is_an_answer_too(
    device: Device, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise IndexError("no such thing")

    device.commands._handlers = {"status": broken, "bench": device.bench}
    device.take("status", "a")
    device.take("bench", "b")
    monkeypatch.setattr(device.slow, "poll", broken)
    for now_ms in (6, 7):
        device.commands.tick(now_ms)
    assert [(r.result.id, r.result.ok, r.result.reason) for r in device.replies] == [
        ("a", False, Reason.DEVICE_UNFIT),
        ("b", False, Reason.DEVICE_UNFIT),
    ]
    assert "IndexError: no such thing" in device.replies[0].result.what
    assert [r.exc_info is not None for r in caplog.records] == [True, True]


def test_a_command_is_done_once_while_the_disk_comes_and_goes(device: Device, tmp_path: Path) -> None:
    device.take("status", "a")
    device.outbox.flush(0)
    fault = StorageFault(Reason.STORAGE_FAULT, "Input/output error", "check the disk")
    with pytest.MonkeyPatch.context() as disk:

        def broken(*_: Any, **__: Any) -> Any:
            disk.undo()
            raise fault

        disk.setattr(device.outbox._box, "apply", broken)
        device.take("status", "b")
        device.outbox.flush(1)
    assert not device.outbox.on_disk
    for id_ in ("a", "b"):
        device.take("status", id_)
    assert device.calls == ["a", "b"]
    device.outbox.flush(100_000)
    assert device.outbox.on_disk
    device.outbox.close(100_000)
    restarted = Device(tmp_path / "outbox.db")
    for id_ in ("a", "b"):
        restarted.take("status", id_)
    assert restarted.calls == []
    restarted.outbox.close(0)


def test_text_arguments_are_required() -> None:
    def command(**args: str | int) -> wire.Command:
        return wire.Command(1, "acme", "line-3", "a", "rollback", 0, 1, dict(args))

    assert text_argument(command(model="tiny"), "model") == "tiny"
    for bad in (command(), command(model=""), command(model=3), command(other="tiny")):
        with pytest.raises(MessageRejected, match="command rollback needs the argument model"):
            text_argument(bad, "model")
