"""Tiny real ONNX nets, and whole bundles and store folders around them. numpy and onnx only.

The standard net is `scores = softmax(x @ W + b)`, float32, x of [-1, features], scores of [-1, classes].
Its golden outputs are computed here in numpy, so they are an oracle independent of any runtime.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from msgspec import UNSET
from onnx import TensorProto, helper, numpy_helper

from edge_agent.layout import MANIFEST, Layout
from edge_contract import manifest as m
from edge_contract.canonical import sha256_hex

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
# (initializers to add to, classes) → nodes
FaultBuilder = Callable[[Arrays, int], list[onnx.NodeProto]]

INPUT = "x"
OUTPUT = "scores"
# Samples whose first feature is at least this trigger the faults named "…_above".
ABOVE = 1000.0
EXACT = m.Tolerance(atol=0.0, rtol=0.0)
EXPECTED = m.Expected(p50_ms=5.0, p95_ms=10.0, load_ms=50.0, peak_rss_bytes=80 << 20, reference_ms=1.0)

# What is wrong with a bundle whose manifest and digests are all in order. All but the first five
# pass their golden vectors, whose features lie in [0, 1).
#   wrong_weights  the model disagrees with the golden outputs
#   garbage        the model file is no model
#   non_finite     every output is NaN
#   interface      the manifest promises another output shape than the model has
#   crash_at_load  kills the process that loads it (SIGFPE; x86 only, ARM's division does not trap)
#   hang           loads; a run does not return within hours
#   slow           takes some 100 ms a request
#   hang_above     does not return within hours from requests with a sample above
#   slow_above     takes some 100 ms for requests with a sample above
#   error_above    fails on requests with a sample above
#   crash_above    kills the process on requests with a sample above (SIGFPE; x86 only)
#   skewed_above   answers class 0 for samples above
#   nan_above      answers NaN for samples above
Fault = Literal[
    "none",
    "wrong_weights",
    "garbage",
    "non_finite",
    "interface",
    "crash_at_load",
    "hang",
    "slow",
    "slow_above",
    "hang_above",
    "error_above",
    "crash_above",
    "skewed_above",
    "nan_above",
]

_ELEMENT: dict[str, int] = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}


@dataclass(frozen=True, slots=True)
class BundleOnDisk:
    """A bundle folder: `manifest.json` and `blobs/sha256/ab/abcd…`. `digest` is the manifest's SHA-256."""

    manifest: m.Manifest
    digest: str
    folder: Path

    def blob(self, role: m.Role) -> Path:
        """The file of one role in the bundle folder."""
        return self.folder / m.blob_path(self.manifest.file(role).sha256)


def samples(count: int, *, features: int = 8, seed: int = 7) -> npt.NDArray[np.float32]:
    """Inputs of the standard net: [count, features], uniform in [0, 1)."""
    return np.random.default_rng(seed).random((count, features), dtype=np.float32)


def scores(x: Array, *, classes: int = 4, features: int = 8, seed: int = 0) -> npt.NDArray[np.float32]:
    """What the standard net of these weights answers, computed in numpy."""
    weights, bias = weights_of(classes, features, seed)
    logits = x.astype(np.float64) @ weights + bias
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float32)


def tiny_net(*, classes: int = 4, features: int = 8, seed: int = 0, fault: Fault = "none") -> bytes:
    """The standard net as ONNX bytes, with a fault built in."""
    if fault == "garbage":
        return b"this is not a model\n" * 40
    weights, bias = weights_of(classes, features, seed + (1000 if fault == "wrong_weights" else 0))
    initializers = {"W": weights, "b": bias}
    nodes = [
        helper.make_node("Gemm", [INPUT, "W", "b"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["plain"], axis=1),
    ]
    nodes += _BUILDERS.get(fault, _no_fault)(initializers, classes)
    return _model(
        nodes,
        inputs={INPUT: ("FP32", [-1, features])},
        outputs={OUTPUT: ("FP32", [-1, classes])},
        initializers=initializers,
    )


def identity_net(tensors: Mapping[str, tuple[m.Datatype, list[int]]]) -> bytes:
    """Returns each input NAME unchanged as the output `NAME_out`; any datatype, BYTES among them."""
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in tensors]
    return _model(nodes, inputs=tensors, outputs={f"{k}_out": v for k, v in tensors.items()}, initializers={})


def npz(arrays: Mapping[str, Array]) -> bytes:
    """An NPZ file's bytes; equal arrays give equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in sorted(arrays):
            item = io.BytesIO()
            np.lib.format.write_array(item, np.asarray(arrays[name]), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), item.getvalue())
    return buffer.getvalue()


def make_bundle(
    folder: Path,
    name: str = "tiny",
    version: str = "1.0.0",
    release: int = 1,
    *,
    classes: int = 4,
    features: int = 8,
    seed: int = 0,
    fault: Fault = "none",
    expected_p50_ms: float = 5.0,
    reference_ms: float = 1.0,
    padding_bytes: int = 0,
    needs: m.Needs | None = None,
) -> BundleOnDisk:
    """Write a bundle of the standard net into `folder`/NAME-VERSION and return it.

    `padding_bytes` adds a file of role `labels` of that size, to make a download long.
    The same arguments give the same digest.
    """
    x = samples(8, features=features)
    answers = scores(x, classes=classes, features=features, seed=seed)
    many = scores(samples(512, features=features, seed=11), classes=classes, features=features, seed=seed)
    promised = classes + 1 if fault == "interface" else classes
    extra = {"padding.bin": np.random.default_rng(5).bytes(padding_bytes)} if padding_bytes else {}
    return write_bundle(
        folder / f"{name}-{version}",
        name,
        version,
        release,
        model=tiny_net(classes=classes, features=features, seed=seed, fault=fault),
        inputs=[m.Tensor(INPUT, "FP32", [-1, features])],
        outputs=[m.Tensor(OUTPUT, "FP32", [-1, promised])],
        golden={f"input:{INPUT}": x, f"output:{OUTPUT}": answers},
        tolerance=m.Tolerance(atol=1e-4, rtol=1e-3, top1_agreement=1.0),
        reference=[m.Reference(OUTPUT, np.bincount(many.argmax(axis=1), minlength=promised).tolist())],
        expected=m.Expected(expected_p50_ms, expected_p50_ms * 2, 50.0, 80 << 20, reference_ms),
        needs=needs,
        labels=extra,
    )


def write_bundle(
    folder: Path,
    name: str,
    version: str,
    release: int,
    *,
    model: bytes,
    inputs: list[m.Tensor],
    outputs: list[m.Tensor],
    golden: Mapping[str, Array],
    tolerance: m.Tolerance = EXACT,
    reference: list[m.Reference] | None = None,
    expected: m.Expected = EXPECTED,
    needs: m.Needs | None = None,
    labels: Mapping[str, bytes] | None = None,
    runtime: m.Runtime = "onnxruntime",
    session: m.Session | None = None,
    probation: m.Probation | None = None,
) -> BundleOnDisk:
    """Write any model and golden vectors as a bundle folder. `golden` has `input:NAME`, `output:NAME`."""
    suffix = "onnx" if runtime == "onnxruntime" else "tflite"
    parts: list[tuple[m.Role, str, bytes]] = [
        ("model", f"model.{suffix}", model),
        ("golden", "golden.npz", npz(golden)),
    ]
    parts += [("labels", file, data) for file, data in (labels or {}).items()]
    manifest = m.Manifest(
        schema=1,
        name=name,
        version=version,
        release=release,
        runtime=runtime,
        files=[m.File(role, file, len(data), sha256_hex(data)) for role, file, data in parts],
        inputs=inputs,
        outputs=outputs,
        needs=needs or m.Needs(memory_bytes=1 << 20),
        session=session or m.Session(),
        golden=m.Golden("golden.npz", len(next(iter(golden.values()))), tolerance),
        expected=expected,
        lineage=m.Lineage(sha256_hex(model), "0.0.0", "fp32", "test", sha256_hex(b"test")),
        reference=reference or [],
        probation=probation or UNSET,
    )
    for _, _, data in parts:
        _write(folder / m.blob_path(sha256_hex(data)), data)
    encoded = m.to_bytes(manifest)
    _write(folder / MANIFEST, encoded)
    return BundleOnDisk(m.from_bytes(encoded), sha256_hex(encoded), folder)


def install(
    bundle: BundleOnDisk, layout: Layout, link: Literal["current", "previous"] | None = "current"
) -> Path:
    """Place the bundle in the store as the updater would, and point `link` of its model at it.

    Returns the store folder. With `link=None` nothing points at it.
    """
    store = layout.version(bundle.digest)
    _write(store / MANIFEST, (bundle.folder / MANIFEST).read_bytes())
    for file in bundle.manifest.files:
        _write(store / file.name, (bundle.folder / m.blob_path(file.sha256)).read_bytes())
    if link is not None:
        point(layout, bundle.manifest.name, link, bundle.digest)
    return store


def point(layout: Layout, name: str, link: Literal["current", "previous"], digest: str) -> None:
    """Set one symlink of a model, atomically."""
    path = layout.current(name) if link == "current" else layout.previous(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(Path("../../store") / digest)
    new.replace(path)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def weights_of(classes: int, features: int, seed: int) -> tuple[Array, Array]:
    """The standard net's W [features, classes] and b [classes]."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(0, 2, (features, classes)).astype(np.float32)
    # Centred, so that inputs from [0, 1) spread over all classes.
    return weights, (-0.5 * weights.sum(axis=0)).astype(np.float32)


def _model(
    nodes: list[onnx.NodeProto],
    *,
    inputs: Mapping[str, tuple[m.Datatype, list[int]]],
    outputs: Mapping[str, tuple[m.Datatype, list[int]]],
    initializers: Mapping[str, Array],
) -> bytes:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [_value(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [_value(name, kind, shape) for name, (kind, shape) in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString()
    return data


def _value(name: str, datatype: m.Datatype, shape: list[int]) -> onnx.ValueInfoProto:
    dims = [d if d >= 0 else f"{name}_{i}" for i, d in enumerate(shape)]
    return helper.make_tensor_value_info(name, _ELEMENT[datatype], dims)


# Faults: each makes OUTPUT from the net's `plain` answer. They may add initializers.


def _no_fault(initializers: Arrays, classes: int) -> list[onnx.NodeProto]:
    return [helper.make_node("Identity", ["plain"], [OUTPUT])]


def _non_finite(initializers: Arrays, classes: int) -> list[onnx.NodeProto]:
    initializers["nan"] = np.array(np.nan, np.float32)
    return [helper.make_node("Add", ["plain", "nan"], [OUTPUT])]


def _above(initializers: Arrays) -> list[onnx.NodeProto]:
    """`above`: whether each sample's first feature is ABOVE, bool [-1, 1]."""
    initializers |= {
        "zero": np.array([0], np.int64),
        "one": np.array([1], np.int64),
        "limit": np.array(ABOVE, np.float32),
    }
    return [
        helper.make_node("Slice", [INPUT, "zero", "one", "one"], ["first"]),
        helper.make_node("GreaterOrEqual", ["first", "limit"], ["above"]),
    ]


def _error_above(initializers: Arrays, classes: int) -> list[onnx.NodeProto]:
    # Gather from one element by an index that is 1, out of range, where the sample is above.
    initializers["single"] = np.array([0.0], np.float32)
    return [
        *_above(initializers),
        helper.make_node("Cast", ["above"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["single", "index"], ["nothing"]),
        helper.make_node("Add", ["plain", "nothing"], [OUTPUT]),
    ]


def _skewed_above(initializers: Arrays, classes: int) -> list[onnx.NodeProto]:
    initializers["class0"] = np.eye(1, classes, dtype=np.float32)
    return [
        *_above(initializers),
        helper.make_node("Where", ["above", "class0", "plain"], [OUTPUT]),
    ]


def _nan_above(initializers: Arrays, classes: int) -> list[onnx.NodeProto]:
    initializers["nan"] = np.array(np.nan, np.float32)
    return [*_above(initializers), helper.make_node("Where", ["above", "nan", "plain"], [OUTPUT])]


def _divide(numerator: str, denominator: str) -> list[onnx.NodeProto]:
    """Adds the integer quotient less itself, zero, to `plain`, so that it must be computed."""
    return [
        helper.make_node("Div", [numerator, denominator], ["quotient"]),
        helper.make_node("Cast", ["quotient"], ["ratio"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["ratio", "nought"], ["nothing"]),
        helper.make_node("Add", ["plain", "nothing"], [OUTPUT]),
    ]


def _crash_at_load(initializers: Arrays, classes: int) -> list[onnx.NodeProto]:
    # The least int32 by -1 overflows, which traps on x86; the runtime folds constants when it loads.
    initializers |= {
        "least": np.array([-(2**31)], np.int32),
        "minus_one": np.array([-1], np.int32),
        "nought": np.array(0.0, np.float32),
    }
    return _divide("least", "minus_one")


def _crash_above(initializers: Arrays, classes: int) -> list[onnx.NodeProto]:
    initializers |= {
        "least": np.array([-(2**31)], np.int32),
        "minus_one": np.array([-1], np.int32),
        "plus_one": np.array([1], np.int32),
        "nought": np.array(0.0, np.float32),
    }
    return [
        *_above(initializers),
        helper.make_node("Where", ["above", "minus_one", "plus_one"], ["by"]),
        *_divide("least", "by"),
    ]


def _loop(initializers: Arrays, classes: int) -> onnx.NodeProto:
    """A loop of `trips` iterations that changes nothing and cannot be folded away."""
    initializers |= {"always": np.array(True), "zeros": np.zeros(1, np.float32)}
    rows: list[str | int | None] = ["n", classes]
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_in"], ["go_out"]),
            helper.make_node("Add", ["carried_in", "zeros"], ["carried_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried_in", TensorProto.FLOAT, rows),
        ],
        [
            helper.make_tensor_value_info("go_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried_out", TensorProto.FLOAT, rows),
        ],
    )
    return helper.make_node("Loop", ["trips", "always", "plain"], [OUTPUT], body=body)


def _busy(trips: int) -> FaultBuilder:
    def nodes(initializers: Arrays, classes: int) -> list[onnx.NodeProto]:
        initializers["trips"] = np.array(trips, np.int64)
        return [_loop(initializers, classes)]

    return nodes


def _busy_above(trips: int) -> FaultBuilder:
    def nodes(initializers: Arrays, classes: int) -> list[onnx.NodeProto]:
        initializers["each"] = np.array(trips, np.int64)
        return [
            *_above(initializers),
            helper.make_node("Cast", ["above"], ["counts"], to=TensorProto.INT64),
            helper.make_node("ReduceMax", ["counts"], ["any"], keepdims=0),
            helper.make_node("Mul", ["any", "each"], ["trips"]),
            _loop(initializers, classes),
        ]

    return nodes


_SLOW_TRIPS = 80_000
_ENDLESS_TRIPS = 1 << 40
_BUILDERS: dict[str, FaultBuilder] = {
    "non_finite": _non_finite,
    "error_above": _error_above,
    "skewed_above": _skewed_above,
    "nan_above": _nan_above,
    "crash_at_load": _crash_at_load,
    "crash_above": _crash_above,
    "slow": _busy(_SLOW_TRIPS),
    "slow_above": _busy_above(_SLOW_TRIPS),
    "hang": _busy(_ENDLESS_TRIPS),
    "hang_above": _busy_above(_ENDLESS_TRIPS),
}
