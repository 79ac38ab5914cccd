"""Bundles as edge-optimize writes them, with blobs of any bytes: the registry never looks inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import Result

from edge_contract import canonical
from edge_contract.manifest import (
    Expected,
    File,
    Golden,
    Lineage,
    Manifest,
    Metric,
    Needs,
    Session,
    Tensor,
    Tolerance,
    blob_path,
    to_bytes,
)
from fleet.registry.reader import Reader

PASSWORD = "correct horse"


def manifest(blobs: dict[str, bytes], **changes: Any) -> Manifest:
    """A manifest over `blobs` (name → bytes; `model.onnx` and `golden.npz` are needed)."""
    roles = {"model.onnx": "model", "golden.npz": "golden"}
    values: dict[str, Any] = {
        "schema": 1,
        "name": "fashion",
        "version": "1.0.0",
        "release": 1,
        "runtime": "onnxruntime",
        "files": [
            File(roles.get(name, "labels"), name, len(data), canonical.sha256_hex(data))  # type: ignore[arg-type]
            for name, data in blobs.items()
        ],
        "inputs": [Tensor("x", "FP32", [-1, 4])],
        "outputs": [Tensor("y", "FP32", [-1, 2])],
        "needs": Needs(memory_bytes=1 << 20),
        "session": Session(),
        "golden": Golden("golden.npz", 1, Tolerance(0.0, 0.0)),
        "expected": Expected(1.0, 2.0, 3.0, 4, 5.0),
        "lineage": Lineage(
            source_sha256="1" * 64,
            optimizer_version="0.1.0",
            recipe="static_int8",
            profile="raspberry-pi-4",
            profile_sha256="2" * 64,
            metrics=[Metric("top1", "test", 0.91, 0.92, 2000)],
        ),
    }
    return Manifest(**{**values, **changes})


def bundle(folder: Path, *, weights: bytes = b"weights", **changes: Any) -> Manifest:
    """Write a whole bundle into `folder`; returns its manifest."""
    blobs = {"model.onnx": weights, "golden.npz": b"golden", "labels.txt": b"shirt\nshoe\n"}
    made = manifest(blobs, **changes)
    for data in blobs.values():
        path = folder / blob_path(canonical.sha256_hex(data))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (folder / "manifest.json").write_bytes(to_bytes(made))
    return made


def digest(made: Manifest) -> str:
    """The version's identity."""
    return canonical.sha256_hex(to_bytes(made))


def reader(registry: Path) -> Reader:
    """The registry, verified from the root that was pinned beside its keys."""
    return Reader(str(registry), (registry.parent / "keys" / "root.json").read_bytes())


def json_of(result: Result) -> Any:
    """What a command printed with --json."""
    return json.loads(result.stdout)
