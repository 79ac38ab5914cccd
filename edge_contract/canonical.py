"""Pure: canonical JSON out, strict JSON in. The only door through which foreign bytes become values.

Refused on the way in: more bytes than the limit, duplicate keys, unknown keys, wrong types,
non-finite numbers. Each refusal names the path of the offending field.
It does not know what the values mean; manifest.py, profile.py and wire.py do.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

DEFAULT_LIMIT_BYTES = 1 << 20
_MAX_DEPTH = 32
# RFC 8785 writes whole numbers below this without an exponent.
_PLAIN_BELOW = 1e21


class DecodeFault(ValueError):
    """The bytes are not what they should be. `path` points at the field, `problem` says why."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{problem} at {path}")
        self.path = path
        self.problem = problem


def to_bytes(value: Any) -> bytes:
    """Canonical JSON: UTF-8, sorted keys, no white space, 1.0 as 1. Equal values give equal bytes.

    Raises ValueError for NaN and infinity, which JSON does not have.
    """
    plain = _shortest(msgspec.to_builtins(value, str_keys=True))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def _shortest(value: Any) -> Any:
    """Whole floats as integers, as RFC 8785 writes them: 1 and 1.0 are equal, so are their bytes."""
    if isinstance(value, float) and value.is_integer() and abs(value) < _PLAIN_BELOW:
        return int(value)
    if isinstance(value, dict):
        return {key: _shortest(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_shortest(item) for item in value]
    return value


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
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_Pairs, parse_constant=float)
    except UnicodeDecodeError as e:
        raise DecodeFault("$", f"not UTF-8 (byte {e.start})") from e
    except json.JSONDecodeError as e:
        raise DecodeFault("$", f"not JSON: {e.msg} at character {e.pos}") from e
    except RecursionError as e:
        raise DecodeFault("$", "nested too deeply") from e
    except ValueError as e:  # an integer of more digits than Python converts
        raise DecodeFault("$", f"not JSON: {e}") from e
    return _plain(value, "$", 0)


class _Pairs(list[tuple[str, Any]]):
    """An object as its pairs, so that a duplicate key is still visible when its path is known."""


def _plain(value: Any, path: str, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise DecodeFault(path, f"nested deeper than {_MAX_DEPTH}")
    if isinstance(value, _Pairs):
        return _object(value, path, depth)
    if isinstance(value, list):
        return [_plain(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise DecodeFault(path, "not a finite number")
    if isinstance(value, str):
        _check_text(value, path)
    return value


def _object(pairs: _Pairs, path: str, depth: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, item in pairs:
        _check_text(key, path)
        if key in result:
            raise DecodeFault(f"{path}.{key}", "duplicate key")
        result[key] = _plain(item, f"{path}.{key}", depth + 1)
    return result


def _check_text(text: str, path: str) -> None:
    """JSON can escape half of a surrogate pair; such a string cannot be written again."""
    if not text.isascii() and any("\ud800" <= ch <= "\udfff" for ch in text):
        raise DecodeFault(path, "a lone surrogate in a string")
