"""Faults at durable operations of real processes: loaded by every Python whose path begins with this folder.

The plan in EDGEWARD_FAULTS (JSON, see tests/support/rig.py) says in which process, at which operations below
the state folder, when, and what: a kill, a stop, an error. Each point is hit once: what was hit is kept in a
file, so that a process that was killed and started again goes on to the next point. The product knows
nothing of this: only `os` and two functions of edge_agent.files are wrapped, here.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

_COMMANDS = ("run", "serve", "fetch", "trust", "preflight", "status")
_LONG_HEX = re.compile(r"[0-9a-f]{16,}")
_TEMPORARY = re.compile(r"tmp[a-z0-9_]{8}$")
_NUMBER = re.compile(r"(?<![A-Za-z])\d+")
_real = {name: getattr(os, name) for name in dir(os) if callable(getattr(os, name))}


def _process() -> str:
    return next((word for word in sys.orig_argv if word in _COMMANDS), "")


class Points:
    """The operations of this process, each with a name that is the same in every run."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan
        self._root = plan["root"] + "/"
        self._process = _process()
        self._busy = False
        self._done = set()
        descriptor = _real["open"](plan["done"], os.O_RDONLY | os.O_CREAT, 0o600)
        with os.fdopen(descriptor) as lines:
            self._done = {line.strip() for line in lines}

    @property
    def wanted(self) -> bool:
        """Whether this process is one that the plan is about."""
        return self._process in self._plan["processes"]

    def around(self, name: str, subject: Callable[..., str], function: Callable[..., Any]) -> Any:
        """`function`, with a point before and after it."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._busy:
                return function(*args, **kwargs)
            self._busy = True
            try:
                point = self._point(name, subject(*args, **kwargs))
            finally:
                self._busy = False
            if point is None:
                return function(*args, **kwargs)
            if self._plan["when"] == "before":
                self._act(point, args)
                if self._plan["fault"] == "SHORT":
                    return function(args[0], bytes(args[1])[: len(args[1]) // 2])
                return function(*args, **kwargs)
            result = function(*args, **kwargs)
            self._act(point, args)
            return result

        return wrapped

    def _point(self, name: str, path: str) -> str | None:
        if not path.startswith(self._root) or name not in self._plan["operations"]:
            return None
        if self._plan["only"] not in ("", path):
            return None
        short = path.removeprefix(self._root)
        short = _NUMBER.sub("N", _TEMPORARY.sub("tmpX", _LONG_HEX.sub("D", short)))
        if self._plan["grain"] == "kind":
            point = f"{self._process}: {name}"
        else:
            point = f"{self._process} in {self._state()}: {name} {short}"
        if point in self._done:
            return None
        self._done.add(point)
        return point

    def _state(self) -> str:
        """What the journal says at this moment."""
        try:
            with open(f"{self._root}journal/{self._plan['model']}.json") as file:
                return str(json.loads(file.readline())["state"])
        except OSError:
            return "no journal"

    def _act(self, point: str, args: tuple[Any, ...]) -> None:
        descriptor = _real["open"](self._plan["done"], os.O_WRONLY | os.O_APPEND)
        _real["write"](descriptor, (point + "\n").encode())
        _real["close"](descriptor)
        fault = self._plan["fault"]
        if fault == "KILL":
            _real["kill"](os.getpid(), signal.SIGKILL)
        elif fault == "STOP":
            _real["kill"](os.getpid(), signal.SIGSTOP)
        elif fault not in ("SHORT", "NONE"):
            code = getattr(errno, fault)
            path = args["exchange" in point] if args and isinstance(args[0], str | os.PathLike) else None
            raise OSError(code, os.strerror(code), os.fspath(path) if path is not None else None)


def _in_folder(path: Any, dir_fd: int | None) -> str:
    text = os.fsdecode(path)
    if dir_fd is not None:
        return f"{_real['readlink'](f'/proc/self/fd/{dir_fd}')}/{text}"
    return text


def _path(path: Any, *_: Any, dir_fd: int | None = None, **__: Any) -> str:
    return _in_folder(path, dir_fd)


def _second(_: Any, path: Any, *__: Any, **___: Any) -> str:
    return os.fsdecode(path)


def _descriptor(descriptor: int, *_: Any, **__: Any) -> str:
    try:
        return str(_real["readlink"](f"/proc/self/fd/{descriptor}"))
    except OSError:
        return ""


def _install(points: Points) -> None:
    subjects: dict[str, Callable[..., str]] = {
        **dict.fromkeys(("open", "unlink", "mkdir", "rmdir"), _path),
        **dict.fromkeys(("replace", "rename", "symlink", "link"), _second),
        **dict.fromkeys(("write", "fsync", "fdatasync"), _descriptor),
    }
    for name, subject in subjects.items():
        setattr(os, name, points.around(name, subject, _real[name]))
    from edge_agent import files

    files._syncfs = points.around("syncfs", _path, files._syncfs)
    files._exchange = points.around("exchange", _second, files._exchange)


_plan = os.environ.get("EDGEWARD_FAULTS")
if _plan and _process():
    _points = Points(json.loads(_plan))
    if _points.wanted:
        _install(_points)
