"""Pure: canonical JSON out, strict JSON in. The only door through which foreign bytes become values.

Refused on the way in: more bytes than the limit, duplicate keys, unknown keys, wrong types,
non-finite numbers. Each refusal names the path of the offending field.
It does not know what the values mean; manifest.py, profile.py and wire.py do.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NoReturn, TypeVar

import msgspec

T = TypeVar("T")

DEFAULT_LIMIT_BYTES = 1 << 20
_MAX_DEPTH = 32


class DecodeFault(ValueError):
    """The bytes are not what they should be. `path` points at the field, `problem` says why."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{problem} at {path}")
        self.path = path
        self.problem = problem


def to_bytes(value: Any) -> bytes:
    """Canonical JSON: UTF-8, sorted keys, no white space. Equal values give equal bytes."""
    plain = msgspec.to_builtins(value, str_keys=True, order="sorted")
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def sha256_hex(data: bytes) -> str:
    """Lower-case hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def from_bytes(data: bytes, kind: type[T], *, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> T:
    """Decode one JSON document into `kind`.

    Raises DecodeFault with the path of the first offending field.
    """
    return from_builtins(parse(data, limit_bytes=limit_bytes), kind)


def from_builtins(value: Any, kind: type[T]) -> T:
    """Validate plain values (from JSON or TOML) as `kind`. Raises DecodeFault."""
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as e:
        problem, _, path = str(e).rpartition(" - at ")
        if not problem:
            problem, path = str(e), "$"
        raise DecodeFault(path.strip("`"), problem) from e


def parse(data: bytes, *, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> Any:
    """Parse JSON into plain values; refuses oversize, duplicate keys, NaN and deep nesting."""
    if len(data) > limit_bytes:
        raise DecodeFault("$", f"{len(data)} bytes, over the limit of {limit_bytes}")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_Pairs, parse_constant=_no_constant)
    except UnicodeDecodeError as e:
        raise DecodeFault("$", f"not UTF-8 (byte {e.start})") from e
    except json.JSONDecodeError as e:
        raise DecodeFault("$", f"not JSON: {e.msg} at character {e.pos}") from e
    except RecursionError as e:
        raise DecodeFault("$", "nested too deeply") from e
    return _plain(value, "$", 0)


class _Pairs(list[tuple[str, Any]]):
    """An object as its pairs, so that a duplicate key is still visible when its path is known."""


def _no_constant(name: str) -> NoReturn:
    raise DecodeFault("$", f"{name} is not a JSON number")


def _plain(value: Any, path: str, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise DecodeFault(path, f"nested deeper than {_MAX_DEPTH}")
    if isinstance(value, _Pairs):
        result: dict[str, Any] = {}
        for key, item in value:
            if key in result:
                raise DecodeFault(f"{path}.{key}", "duplicate key")
            result[key] = _plain(item, f"{path}.{key}", depth + 1)
        return result
    if isinstance(value, list):
        return [_plain(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
    return value
