"""The bundle: manifest.json and content-addressed blobs, made from the chosen candidate.

The same model, profile and data give the same blobs and the same manifest but for what was measured
(docs/decisions/0003-reproducible-bundles.md). Signing and publishing are edge-fleet's.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import UNSET, UnsetType
from numpy.typing import NDArray

from edge_contract import canonical, manifest
from edge_contract.bench import Measured
from edge_contract.console import distribution_version
from edge_contract.manifest import (
    Expected,
    File,
    Golden,
    Lineage,
    Manifest,
    Metric,
    Probation,
    Reference,
    Role,
    Tensor,
    Tolerance,
)
from edge_contract.profile import Profile, RecipeName
from optimizer import profile as profiles
from optimizer.metric import TOP1

GOLDEN_FILE = "golden.npz"
GOLDEN_SAMPLES = 8
# The earliest time a ZIP file can hold: the same vectors are the same bytes.
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
# What the measured peak is multiplied by and rounded up to: a device's allocator is not this machine's.
_MEMORY_MARGIN = 1.25
_MEMORY_STEP_BYTES = 16 << 20

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Content:
    """Everything a bundle is made of. `selection_outputs` are the chosen file's on the selection split.

    `precision` is the family whose rounding the file has; `batch` the model's fixed batch, None where free.
    """

    name: str
    version: str
    release: int
    profile: Profile
    precision: RecipeName
    recipe: str
    model: bytes
    inputs: list[Tensor]
    outputs: list[Tensor]
    batch: int | None
    golden: Arrays
    selection_outputs: Arrays
    measured: Measured
    reference_ms: float
    source_sha256: str
    calibration_sha256: str
    metrics: list[Metric]
    probation: Probation | UnsetType = UNSET


def write(content: Content, folder: Path) -> Manifest:
    """Write the bundle into the empty `folder`; the manifest is what was written."""
    golden = npz_bytes(content.golden)
    files = [_file("model", "model.onnx", content.model), _file("golden", GOLDEN_FILE, golden)]
    document = _manifest(content, files)
    for file, data in zip(files, (content.model, golden), strict=True):
        path = folder / manifest.blob_path(file.sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    encoded = manifest.to_bytes(document)
    (folder / "manifest.json").write_bytes(encoded)
    # What devices will refuse must not be written by us either.
    return manifest.from_bytes(encoded)


def golden_places(samples: int, batch: int | None) -> list[int]:
    """Which samples become golden: evenly spread, at least 8, a multiple of a fixed batch."""
    step = batch or 1
    count = min(samples, -(-GOLDEN_SAMPLES // step) * step)
    return [int(place) for place in np.linspace(0, samples - 1, count).round()]


def npz_bytes(arrays: Arrays) -> bytes:
    """An NPZ file of `arrays`, the same bytes for the same arrays."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            entry = zipfile.ZipInfo(f"{name}.npy", _ZIP_TIME)
            with archive.open(entry, "w") as target:
                np.lib.format.write_array(target, np.ascontiguousarray(arrays[name]), allow_pickle=False)
    return buffer.getvalue()


def tolerance(precision: RecipeName, outputs: Arrays, *, classes: bool) -> Tolerance:
    """How far a device's answers may be from the golden ones: other kernels round otherwise.

    `outputs` are the golden ones; `classes`: the outputs are class scores.
    """
    spread = max((_range(value) for value in outputs.values()), default=0.0)
    agreement = 0.75 if classes else 0.0
    if precision in ("static_int8", "dynamic_int8"):
        return Tolerance(atol=0.05 * spread, rtol=0.0, top1_agreement=agreement)
    if precision == "fp16":
        return Tolerance(atol=1e-2 * spread, rtol=1e-2, top1_agreement=agreement)
    return Tolerance(atol=1e-4 * spread, rtol=1e-3, top1_agreement=agreement)


def memory_need(peak_rss_bytes: int) -> int:
    """Memory a device must have for a model that peaked at `peak_rss_bytes` here."""
    wanted = int(peak_rss_bytes * _MEMORY_MARGIN)
    return -(-wanted // _MEMORY_STEP_BYTES) * _MEMORY_STEP_BYTES


def _manifest(content: Content, files: list[File]) -> Manifest:
    measured = content.measured
    golden_outputs = {k: v for k, v in content.golden.items() if k.startswith("output:")}
    classes = any(metric.name == TOP1 for metric in content.metrics)
    return Manifest(
        schema=1,
        name=content.name,
        version=content.version,
        release=content.release,
        runtime=content.profile.runtime,
        files=files,
        inputs=content.inputs,
        outputs=content.outputs,
        needs=content.profile.needs(memory_need(measured.peak_rss_bytes)),
        session=content.profile.session,
        golden=Golden(
            file=GOLDEN_FILE,
            # As devices count: one sample is what one inference takes.
            samples=len(next(iter(content.golden.values()))) // (content.batch or 1),
            tolerance=tolerance(content.precision, golden_outputs, classes=classes),
        ),
        expected=Expected(
            p50_ms=measured.p50_ms,
            p95_ms=measured.p95_ms,
            load_ms=measured.load_ms,
            peak_rss_bytes=measured.peak_rss_bytes,
            reference_ms=content.reference_ms,
        ),
        lineage=Lineage(
            source_sha256=content.source_sha256,
            optimizer_version=distribution_version(),
            recipe=content.recipe,
            profile=content.profile.name,
            profile_sha256=profiles.digest(content.profile),
            calibration_sha256=content.calibration_sha256,
            metrics=content.metrics,
        ),
        reference=_references(content.selection_outputs),
        probation=content.probation,
    )


def _references(outputs: Arrays) -> list[Reference]:
    """How often each class was on top, for every float output of shape [samples, classes]."""
    return [
        Reference(name, [int(n) for n in np.bincount(value.argmax(axis=1), minlength=value.shape[1])])
        for name, value in outputs.items()
        if value.ndim == 2 and value.shape[1] > 1 and value.dtype.kind == "f"
    ]


def _file(role: Role, name: str, data: bytes) -> File:
    return File(role, name, len(data), canonical.sha256_hex(data))


def _range(values: NDArray[Any]) -> float:
    return float(values.max() - values.min()) if values.dtype.kind == "f" and values.size else 0.0
