"""Signed commands: opened, dispatched once, answered; the same id again gets the same answer.

What a command does is given by the composition root as a handler; this module knows none of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from edge_agent.messaging.mqtt import Message
from edge_agent.messaging.outbox import Outbox
from edge_contract import canonical, wire
from edge_contract.errors import DeviceUnfit, EdgewardError, MessageRejected, Reason

log = logging.getLogger("edge_agent.commands")

_TOPIC_LIMIT_BYTES = 1024
_MISTAKE_CHARACTERS = 300


class Pending(Protocol):
    """Work that takes a while."""

    def poll(self) -> dict[str, Any] | None:
        """Its data when it is done. Raises EdgewardError when it failed."""


Handler = Callable[[wire.Command], dict[str, Any] | Pending]
Reply = Callable[[str, bytes, bytes], None]


class _Open(NamedTuple):
    message: Message
    command: wire.Command
    work: Pending


class Commands:
    """Used by the control loop's thread."""

    def __init__(
        self, handlers: Mapping[str, Handler], outbox: Outbox, reply: Reply, result_topic: str
    ) -> None:
        self._handlers = handlers
        self._outbox = outbox
        self._reply = reply
        self._result_topic = result_topic
        self._open: list[_Open] = []

    def take(self, message: Message, command: wire.Command, now_ms: int) -> None:
        """Dispatch a verified command."""
        known = self._outbox.result(command.id)
        if known is not None:
            self._answer(message, known)
        elif any(o.command.id == command.id for o in self._open):
            return  # under way: its answer comes once
        else:
            self._dispatch(message, command, now_ms)

    def tick(self, now_ms: int) -> None:
        """Answer what has finished."""
        for item in list(self._open):
            try:
                data = item.work.poll()
            except EdgewardError as e:
                self._open.remove(item)
                self._finish(item.message, item.command, _failure(item.command.id, e, now_ms))
                continue
            except Exception as e:  # noqa: BLE001 - answered and logged
                self._open.remove(item)
                self._finish(item.message, item.command, _mistake(item.command, e, now_ms))
                continue
            if data is not None:
                self._open.remove(item)
                self._finish(item.message, item.command, _success(item.command.id, data, now_ms))

    def _dispatch(self, message: Message, command: wire.Command, now_ms: int) -> None:
        try:
            outcome = self._handlers[command.name](command)
        except EdgewardError as e:
            self._finish(message, command, _failure(command.id, e, now_ms))
            return
        except Exception as e:  # noqa: BLE001 - answered and logged
            self._finish(message, command, _mistake(command, e, now_ms))
            return
        if isinstance(outcome, dict):
            self._finish(message, command, _success(command.id, outcome, now_ms))
        else:
            self._open.append(_Open(message, command, outcome))

    def _finish(self, message: Message, command: wire.Command, result: wire.Result) -> None:
        body = canonical.to_bytes(result)
        self._outbox.keep_result(command.id, command.expires_ms, body)
        self._answer(message, body)

    def _answer(self, message: Message, body: bytes) -> None:
        """Answers go below this device's own result topic, whatever the request asked for."""
        topic = message.response_topic
        below = topic.startswith(self._result_topic + "/")
        # The signature does not cover this field, so it may be anything, also what no topic may hold.
        plain = not set(topic) & set("+#\0") and len(topic.encode()) < _TOPIC_LIMIT_BYTES
        own = topic == self._result_topic or (below and plain)
        self._reply(topic if own else self._result_topic, message.correlation, body)


def text_argument(command: wire.Command, name: str) -> str:
    """A required text argument. Raises MessageRejected."""
    value = command.args.get(name)
    if not isinstance(value, str) or not value:
        raise MessageRejected(
            Reason.MESSAGE_MALFORMED,
            f"command {command.name} needs the argument {name}",
            f"add --arg {name}=…",
        )
    return value


def _success(command_id: str, data: dict[str, Any], now_ms: int) -> wire.Result:
    return wire.Result(1, command_id, True, Reason.OK, "done", "", now_ms, data)


def _failure(command_id: str, error: EdgewardError, now_ms: int) -> wire.Result:
    return wire.Result(1, command_id, False, error.reason, error.what, error.next_step, now_ms)


def _mistake(command: wire.Command, error: Exception, now_ms: int) -> wire.Result:
    """Nobody foresaw it: the traceback is for the log, but who asked is not left without an answer."""
    log.error("command %s (%s) failed", command.id, command.name, exc_info=error)
    what = f"command {command.name} failed here: {type(error).__name__}: {error}"
    step = "look for the traceback in the log of edge-agent.service"
    return _failure(command.id, DeviceUnfit(Reason.DEVICE_UNFIT, what[:_MISTAKE_CHARACTERS], step), now_ms)
