"""The decode child: one encoded blob becomes the blob, in a process of its own under a limit of memory.

What it reads was signed by digest, and is still somebody else's work for a decoder written in C: its crash
or memory bomb is a reason to fetch the blob whole, not an accident. The result is checked here, and synced
and renamed by the parent. Which encoding is used was decided in encodings.py.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from edge_agent.update.lanes import Damaged, Patch
from edge_contract import encodings
from edge_contract.console import error_dict, os_fault
from edge_contract.errors import BundleRejected, DeviceUnfit, EdgewardError, Reason

# The interpreter and what it has loaded, beside what a decoder allocates.
INTERPRETER_BYTES = 48 << 20
_READ_BYTES = 64 << 10
# Bounds of Zstandard itself.
_LEAST_WINDOW_LOG, _MOST_WINDOW_LOG = 10, 30


class Task(NamedTuple):
    """What to decode into what. `base` is None for blobs that are only compressed."""

    algorithm: str
    encoded: Path
    base: Path | None
    result: Path
    size_bytes: int
    sha256: str
    memory_bytes: int


def run_decode(task: Task) -> int:
    """Decode; says how it went in one line of JSON. Returns the exit code."""
    try:
        _decode(task)
    except MemoryError:
        return _failed(_over_memory(task, "more"))
    except OSError as e:
        return _failed(os_fault(e))
    except EdgewardError as e:
        return _failed(e)
    sys.stdout.write(json.dumps({"event": "done"}) + "\n")
    return 0


def _failed(error: EdgewardError) -> int:
    sys.stdout.write(json.dumps({"event": "error", **error_dict(error)}) + "\n")
    return error.exit_code


def _decode(task: Task) -> None:
    digest = hashlib.sha256()
    made = 0
    with ExitStack() as opened:
        encoded = opened.enter_context(task.encoded.open("rb")).fileno()
        base = opened.enter_context(task.base.open("rb")).fileno() if task.base else None
        out = opened.enter_context(task.result.open("wb"))
        try:
            for piece in _DECODERS[task.algorithm](task, encoded, base):
                made += len(piece)
                if made > task.size_bytes:
                    break
                digest.update(piece)
                out.write(piece)
        except Damaged as e:
            raise _damaged(task, str(e)) from e
    if made != task.size_bytes or digest.hexdigest() != task.sha256:
        raise _damaged(task, "what it makes has another length or digest")


def _lanes(task: Task, encoded: int, base: int | None) -> Iterator[bytes]:
    if base is None:
        raise Damaged("it needs a base")
    patch = Patch(encoded)
    if patch.memory_bytes > task.memory_bytes:
        raise _over_memory(task, str(patch.memory_bytes))
    return patch.apply(base)


def _zstd(task: Task, encoded: int, base: int | None) -> Iterator[bytes]:
    """A Zstandard frame. Its prefix is the whole base, mapped and then copied once by the library."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd

    # Much larger windows could not be allocated under the limit, so they are refused before.
    log = min(max(task.memory_bytes.bit_length(), _LEAST_WINDOW_LOG), _MOST_WINDOW_LOG)
    prefix = None
    try:
        if base is not None:
            with mmap.mmap(base, 0, access=mmap.ACCESS_READ) as content:
                prefix = zstd.ZstdDict(content, is_raw=True).as_prefix
        decoder = zstd.ZstdDecompressor(prefix, {zstd.DecompressionParameter.window_log_max: log})
        while not decoder.eof:
            data = os.read(encoded, _READ_BYTES) if decoder.needs_input else b""
            if decoder.needs_input and not data:
                raise Damaged("it is cut off")
            yield decoder.decompress(data, _READ_BYTES)
        if decoder.unused_data or os.read(encoded, 1):
            raise Damaged("there is something behind its end")
    except (zstd.ZstdError, ValueError) as e:
        raise Damaged(str(e)) from e


def _damaged(task: Task, problem: str) -> BundleRejected:
    return BundleRejected(
        Reason.DIGEST_MISMATCH,
        f"{task.algorithm} encoding {task.encoded.name[:12]} of {task.sha256[:12]} is of no use: {problem}",
        "the device fetches the blob whole; make the encoding anew with `edge-fleet registry deltas`",
    )


def _over_memory(task: Task, needed: str) -> DeviceUnfit:
    return DeviceUnfit(
        Reason.MEMORY_TOO_SMALL,
        f"{task.algorithm} encoding {task.encoded.name[:12]} needs {needed} bytes of memory,"
        f" {task.memory_bytes} were promised",
        "the device fetches the blob whole; make the encoding anew with `edge-fleet registry deltas`",
    )


_DECODERS: dict[str, Callable[[Task, int, int | None], Iterator[bytes]]] = {
    encodings.LANES: _lanes,
    encodings.ZSTD: _zstd,
    encodings.ZSTD_PATCH: _zstd,
}
