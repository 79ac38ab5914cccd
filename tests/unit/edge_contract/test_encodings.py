"""The signed list of encodings: what it accepts, what it refuses, how it is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edge_contract import encodings
from edge_contract.errors import BundleRejected, Reason

A, B, C = "a" * 64, "b" * 64, "c" * 64
PATCH = {"algorithm": "lanes", "sha256": C, "size_bytes": 5, "memory_bytes": 9, "base_sha256": B}
WHOLE = {"algorithm": "zstd", "sha256": C, "size_bytes": 90, "memory_bytes": 9}


def document(*offers: dict[str, Any], **changed: Any) -> bytes:
    blob = {"sha256": A, "size_bytes": 100, "encodings": list(offers)}
    plain = {"schema": 1, "name": "m", "version": "2", "manifest_sha256": B, "blobs": [blob]} | changed
    return json.dumps(plain).encode()


def test_what_is_written_is_read() -> None:
    found = encodings.from_bytes(document(PATCH, WHOLE))
    assert [e.algorithm for e in found.of(A)] == ["lanes", "zstd"]
    assert found.of(B) == []
    assert encodings.from_bytes(encodings.to_bytes(found)) == found


def test_an_algorithm_of_a_later_edgeward_is_passed_on() -> None:
    """Else one new encoding would keep older devices from all others."""
    found = encodings.from_bytes(document(WHOLE, PATCH | {"algorithm": "planes-2"}))
    assert len(found.of(A)) == 2


@pytest.mark.parametrize(
    ("data", "path"),
    [
        (document(PATCH | {"base_sha256": None}), "base_sha256"),
        (document(WHOLE | {"base_sha256": B}), "base_sha256"),
        (document(PATCH | {"base_sha256": A}), "base_sha256"),
        (document(PATCH | {"size_bytes": 100}), "size_bytes"),
        (document(PATCH | {"size_bytes": 0}), "size_bytes"),
        (document(PATCH | {"sha256": "../../etc/passwd"}), "sha256"),
        (document(PATCH | {"more": 1}), "more"),
        (document(PATCH, schema=2), "schema"),
        (document(blobs=[{"sha256": A, "size_bytes": 1, "encodings": []}] * 2), "$.blobs[1].sha256"),
        (b"[]", "$"),
        (b"\0" * 100, "$"),
        (b"", "$"),
    ],
)
def test_what_makes_no_sense_is_refused(data: bytes, path: str) -> None:
    with pytest.raises(BundleRejected, match="encodings") as refused:
        encodings.from_bytes(data)
    assert refused.value.reason is Reason.MANIFEST_INVALID
    assert path in refused.value.what


def test_it_is_a_target_of_its_own() -> None:
    assert encodings.target_name("fashion", "1.2") == "models/fashion/1.2~encodings.json"
