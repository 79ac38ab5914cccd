"""Run a command of `edge-fleet` on copies of a registry, and break each durable step of it once.

A program of its own, because it forks: `python -m tests.support.kill_points FOLDER FAULT WORDS…`, where
FOLDER holds `registry` and `keys` and WORDS may say {registry}, {keys}, {here}. Each copy is left beside
FOLDER as the fault left it. Prints one JSON object a line: point, folder, how the command ended.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fleet.cli import main
from fleet.registry import files

KILL_BEFORE, KILL_AFTER, FULL, BROKEN = "kill -9 before", "kill -9 after", "ENOSPC", "EIO"
FAULTS = (KILL_BEFORE, KILL_AFTER, FULL, BROKEN)
# What makes a step durable: each is broken where it happens.
_STEPS = ("_place", "rename", "remove_folder")


def sabotage(number: int, fault: str, tell: Callable[[str], None]) -> None:
    """Break step `number` of this process; `tell` gets its name when it is reached."""
    done = 0

    def wrapped(name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def step(path: Path, *rest: Any) -> Any:
            nonlocal done
            done += 1
            if done != number:
                return act(path, *rest)
            tell(f"{name.strip('_')} {_shape(path)}")
            if fault == FULL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            if fault == BROKEN:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            if fault == KILL_AFTER:
                act(path, *rest)
            os.kill(os.getpid(), signal.SIGKILL)
            return None

        return step

    for name in _STEPS:
        setattr(files, name, wrapped(name, getattr(files, name)))


def _shape(path: Path) -> str:
    """A name that is the same in each run."""
    return "blob" if path.parent.parent.name == "sha256" else path.name


def run(folder: Path, words: list[str], number: int, fault: str) -> tuple[Path, str, int]:
    """One fault in one copy: the copy, the name of the point (empty: there is none), the wait status."""
    copy = folder.with_name(f"{folder.name}-{fault.replace(' ', '-')}-{number}")
    shutil.copytree(folder, copy)
    places = {"registry": copy / "registry", "keys": copy / "keys", "here": copy}
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        sink = os.open(copy / "stderr", os.O_WRONLY | os.O_CREAT)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(sink, 2)
        sabotage(number, fault, lambda name: os.write(write, name.encode()))
        try:
            main([word.format(**places) for word in words])
        except SystemExit as e:
            sys.stderr.flush()
            os._exit(int(e.code or 0))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        point = pipe.read()
    return copy, point, os.waitpid(child, 0)[1]


def every(folder: Path, fault: str, words: list[str]) -> None:
    """Break step after step until the command gets through."""
    number = 1
    while True:
        copy, point, status = run(folder, words, number, fault)
        if not point:
            return
        killed = os.WIFSIGNALED(status)
        code = -os.WTERMSIG(status) if killed else os.WEXITSTATUS(status)
        print(json.dumps({"point": point, "folder": str(copy), "code": code}), flush=True)
        number += 1


if __name__ == "__main__":
    every(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
