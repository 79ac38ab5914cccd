"""Pure: the manifest of a bundle. It names every blob by digest; the trust framework signs the manifest.

A bundle is this document plus blobs at `blobs/sha256/ab/abcd…`. Nothing here reads or writes files.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from edge_contract import canonical
from edge_contract.errors import BundleRejected, Reason

SCHEMA = 1
LIMIT_BYTES = 1 << 20

Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}\Z")]
Version = Annotated[str, Meta(pattern=r"^[0-9A-Za-z][0-9A-Za-z.+_-]{0,62}\Z")]
# Tenants, devices, command ids: one level of a topic, one part of a path.
Identifier = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
Size = Annotated[int, Meta(ge=0, le=1 << 40)]
# Integers stay exact in every JSON reader.
Count = Annotated[int, Meta(ge=0, lt=1 << 53)]
Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]

Role = Literal["model", "golden", "labels", "external_data"]
Runtime = Literal["onnxruntime", "tflite"]
# Open Inference Protocol names.
Datatype = Literal[
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
    "BYTES",
]

_FILE_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")


class _Strict(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=False):
    """Unknown keys are errors; values do not change after birth."""


class File(_Strict, frozen=True):
    """One blob: its role, the name it has in the store, size and digest of its content."""

    role: Role
    name: Annotated[str, Meta(pattern=_FILE_NAME.pattern)]
    size_bytes: Size
    sha256: Digest


class Tensor(_Strict, frozen=True):
    """Name, Open Inference Protocol datatype, shape with -1 where a dimension is free."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    datatype: Datatype
    shape: list[Annotated[int, Meta(ge=-1)]]


class Needs(_Strict, frozen=True):
    """What a device must have. Empty lists mean no constraint."""

    memory_bytes: Size
    architectures: list[str] = []
    isa: list[str] = []
    runtime_min_version: str = "0"


class Session(_Strict, frozen=True):
    """Settings of the runtime's session. Spinning threads burn CPU on small boxes, hence off by default."""

    threads: Annotated[int, Meta(ge=1, le=256)] = 1
    spinning: bool = False


class Tolerance(_Strict, frozen=True):
    """Golden outputs agree when |got - expected| <= atol + rtol * |expected| elementwise.

    `top1_agreement` is the share of golden samples whose largest output must be at the same place;
    0 switches that check off (outputs that are not class scores).
    """

    atol: Annotated[float, Meta(ge=0)]
    rtol: Annotated[float, Meta(ge=0)]
    top1_agreement: Share = 0.0


class Golden(_Strict, frozen=True):
    """Golden vectors: the file (npz with `input:NAME` and `output:NAME` arrays) and their tolerance."""

    file: str
    samples: Annotated[int, Meta(ge=1)]
    tolerance: Tolerance


class Expected(_Strict, frozen=True):
    """Measured on the build machine (or a device); a device scales it, it does not take it as its own.

    `reference_ms` is the time of a fixed calibration workload on the machine that measured,
    so that another machine can scale the latencies to its own speed.
    """

    p50_ms: Positive
    p95_ms: Positive
    load_ms: Positive
    peak_rss_bytes: Size
    reference_ms: Positive


class Reference(_Strict, frozen=True):
    """Reference statistics of one output on the selection split: how often each class was the top one."""

    output: str
    top1_counts: list[Count]


class Metric(_Strict, frozen=True):
    """A score of the chosen candidate and of the clean FP32 model on the same samples."""

    name: str
    split: Literal["selection", "test"]
    value: float
    fp32_value: float
    samples: Count


class Lineage(_Strict, frozen=True):
    """Where the model came from, enough to make it again."""

    source_sha256: Digest
    optimizer_version: str
    recipe: str
    profile: str
    profile_sha256: Digest
    calibration_sha256: Digest | None = None
    metrics: list[Metric] = []


class Probation(_Strict, frozen=True, omit_defaults=True):
    """What this model is held to while it is new on a device, where that is not what the device says.

    The keys are those of the agent's `[update]`; what is absent is as it is configured there.
    """

    probation_s: Positive | None = None
    probation_min_requests: Count | None = None
    max_error_rate: Share | None = None
    max_latency_factor: Positive | None = None
    max_tail_factor: Positive | None = None
    max_drift: Share | None = None
    max_memory_growth_bytes: Size | None = None


class Manifest(_Strict, frozen=True):
    """The signed description of one version of one model."""

    schema: Literal[1]
    name: Name
    version: Version
    release: Annotated[int, Meta(ge=1, lt=1 << 53)]
    runtime: Runtime
    files: Annotated[list[File], Meta(min_length=1, max_length=64)]
    inputs: Annotated[list[Tensor], Meta(min_length=1)]
    outputs: Annotated[list[Tensor], Meta(min_length=1)]
    needs: Needs
    session: Session
    golden: Golden
    expected: Expected
    lineage: Lineage
    reference: list[Reference] = []
    probation: Probation | UnsetType = UNSET

    def file(self, role: Role) -> File:
        """The single file of `role`; the decoder has checked that model and golden exist."""
        return next(f for f in self.files if f.role == role)

    @property
    def size_bytes(self) -> int:
        """Sum of all blobs."""
        return sum(f.size_bytes for f in self.files)


def to_bytes(manifest: Manifest) -> bytes:
    """Canonical bytes; their SHA-256 is the version's identity everywhere."""
    return canonical.to_bytes(manifest)


def from_bytes(data: bytes) -> Manifest:
    """Decode and check a manifest.

    Raises BundleRejected naming the offending field.
    """
    try:
        manifest = canonical.from_bytes(data, Manifest, limit_bytes=LIMIT_BYTES)
        _check(manifest)
    except canonical.DecodeFault as e:
        raise BundleRejected(
            Reason.MANIFEST_INVALID,
            f"manifest: {e.problem} at {e.path}",
            "build the bundle again with edge-optimize and publish it anew",
        ) from e
    return manifest


def _check(m: Manifest) -> None:
    """What types alone cannot say."""
    names = [f.name for f in m.files]
    for i, name in enumerate(names):
        if name in names[:i] or name == "manifest.json":
            raise canonical.DecodeFault(f"$.files[{i}].name", f"{name!r} is taken")
    for role in ("model", "golden"):
        if sum(f.role == role for f in m.files) != 1:
            raise canonical.DecodeFault("$.files", f"exactly one file of role {role!r} is needed")
    if m.golden.file != m.file("golden").name:
        raise canonical.DecodeFault("$.golden.file", f"{m.golden.file!r} is not the golden file")
    _check_unique_tensors("inputs", m.inputs)
    _check_unique_tensors("outputs", m.outputs)
    known = {t.name for t in m.outputs}
    for i, ref in enumerate(m.reference):
        if ref.output not in known:
            raise canonical.DecodeFault(f"$.reference[{i}].output", f"{ref.output!r} is not an output")


def _check_unique_tensors(field: str, tensors: list[Tensor]) -> None:
    seen: set[str] = set()
    for i, tensor in enumerate(tensors):
        if tensor.name in seen:
            raise canonical.DecodeFault(f"$.{field}[{i}].name", f"{tensor.name!r} is taken")
        seen.add(tensor.name)


def interface_change(before: Manifest, after: Manifest) -> str:
    """Why a client of `before` cannot talk to `after` unchanged; empty when it can.

    Inputs must be the same, in order, but a dimension may become free. Outputs must begin with the same
    ones; more may follow.
    """
    if len(after.inputs) != len(before.inputs):
        return f"it takes {len(after.inputs)} inputs instead of {len(before.inputs)}"
    if len(after.outputs) < len(before.outputs):
        return f"it gives {len(after.outputs)} outputs instead of {len(before.outputs)}"
    for old, new in zip(before.inputs, after.inputs, strict=True):
        fits = len(old.shape) == len(new.shape) and all(
            n in (o, -1) for o, n in zip(old.shape, new.shape, strict=True)
        )
        if (old.name, old.datatype) != (new.name, new.datatype) or not fits:
            return f"its input {_described(old)} is now {_described(new)}"
    for old, new in zip(before.outputs, after.outputs, strict=False):
        if old != new:
            return f"its output {_described(old)} is now {_described(new)}"
    return ""


def _described(tensor: Tensor) -> str:
    return f"{tensor.name} {tensor.datatype} {tensor.shape}"


def blob_path(sha256: str) -> str:
    """Where a blob lies below a registry's or a bundle's root."""
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


def target_name(name: str, version: str) -> str:
    """The TUF target that carries the manifest of `name`@`version`."""
    return f"models/{name}/{version}.json"


def parse_reference(text: str) -> tuple[str, str]:
    """`MODEL@VERSION` → (model, version). Raises DecodeFault."""
    name, at, version = text.partition("@")
    if not at:
        raise canonical.DecodeFault("$", f"{text!r} is not MODEL@VERSION")
    canonical.from_builtins(name, Name)
    canonical.from_builtins(version, Version)
    return name, version
