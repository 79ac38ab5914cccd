"""One value of every format, with every field set. The golden files hold the same values as bytes."""

from __future__ import annotations

from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from edge_contract import canonical, dsse, wire
from edge_contract.bench import BenchReport, Failed, Measured
from edge_contract.encodings import EncodedBlob, Encoding, Encodings
from edge_contract.errors import Reason
from edge_contract.manifest import (
    Expected,
    File,
    Golden,
    Lineage,
    Manifest,
    Metric,
    Needs,
    Probation,
    Reference,
    Session,
    Tensor,
    Tolerance,
)
from edge_contract.profile import Budget, Facts, Profile, Quantization

NOW_MS = 1_790_000_000_000

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SECOND_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32, 64)))
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(range(64, 96)))


def raw_public(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


MANIFEST = Manifest(
    schema=1,
    name="fashion",
    version="1.2.0",
    release=7,
    runtime="onnxruntime",
    files=[
        File(role="model", name="model.onnx", size_bytes=91_234, sha256="a" * 64),
        File(role="golden", name="golden.npz", size_bytes=12_345, sha256="b" * 64),
        File(role="labels", name="labels.txt", size_bytes=77, sha256="c" * 64),
    ],
    inputs=[Tensor(name="image", datatype="FP32", shape=[-1, 1, 28, 28])],
    outputs=[Tensor(name="logits", datatype="FP32", shape=[-1, 10])],
    needs=Needs(
        memory_bytes=64 << 20, architectures=["x86_64"], isa=["avx2", "fma"], runtime_min_version="1.18"
    ),
    session=Session(threads=2, spinning=True),
    golden=Golden(
        file="golden.npz", samples=16, tolerance=Tolerance(atol=0.05, rtol=0.01, top1_agreement=0.9375)
    ),
    expected=Expected(p50_ms=1.25, p95_ms=2.5, load_ms=17.5, peak_rss_bytes=61_234_567, reference_ms=4.75),
    lineage=Lineage(
        source_sha256="d" * 64,
        optimizer_version="0.1.0",
        recipe="static_int8",
        profile="x86-64-vnni",
        profile_sha256="e" * 64,
        calibration_sha256="f" * 64,
        metrics=[Metric(name="top1", split="test", value=0.9125, fp32_value=0.9135, samples=2000)],
    ),
    reference=[Reference(output="logits", top1_counts=[101, 99, 100, 100, 100, 100, 100, 100, 98, 102])],
    probation=Probation(
        probation_s=120.5,
        probation_min_requests=200,
        max_error_rate=0.01,
        max_latency_factor=2.5,
        max_tail_factor=4.5,
        max_drift=0.25,
        max_memory_growth_bytes=32 << 20,
    ),
)

FACTS = Facts(
    architecture="x86_64",
    cpu="Example CPU @ 2.00GHz",
    isa=["avx2", "avx512_vnni", "fma"],
    cores=2,
    memory_bytes=8 << 30,
    os="Linux-6.1.0-x86_64",
    python="3.11.2",
    agent_version="0.1.0",
    runtimes={"onnxruntime": "1.20.1", "tflite": "2.3.0"},
    encodings=["lanes", "zstd", "zstd-patch"],
)

ENCODINGS = Encodings(
    schema=1,
    name="fashion",
    version="2.0.0",
    manifest_sha256="c" * 64,
    blobs=[
        EncodedBlob(
            "a" * 64,
            312_345,
            [
                Encoding("lanes", "b" * 64, 4_321, 12 << 20, "d" * 64),
                Encoding("zstd", "e" * 64, 290_000, 3 << 20),
            ],
        )
    ],
)

PROFILE = Profile(
    schema=1,
    name="x86-64-vnni",
    title="x86-64 with AVX512-VNNI",
    runtime="onnxruntime",
    architecture="x86_64",
    isa=["avx2", "avx512f", "avx512_vnni"],
    memory_bytes=4 << 30,
    session=Session(threads=1, spinning=False),
    budget=Budget(latency_p95_ms=20.5, memory_bytes=256 << 20, size_bytes=32 << 20),
    quantization=Quantization(
        activations="uint8",
        prefer=["static_int8", "dynamic_int8", "fp16", "fp32"],
        weights="int8",
        per_channel=True,
        reduce_range=False,
        fp16=False,
    ),
    runtime_min_version="1.18",
)

DESIRED = wire.Desired(
    schema=1,
    tenant="acme",
    device="line-3",
    generation=12,
    issued_ms=NOW_MS,
    expires_ms=NOW_MS + 86_400_000,
    models=[wire.DesiredModel(name="fashion", version="1.2.0", manifest_sha256="a" * 64)],
)

COMMAND = wire.Command(
    schema=1,
    tenant="acme",
    device="line-3",
    id="c0ffee-1",
    name="rollback",
    issued_ms=NOW_MS,
    expires_ms=NOW_MS + 60_000,
    args={"model": "fashion", "rounds": 3, "round_s": 0.25, "force": True},
)

STATE = wire.State(
    schema=1,
    generation=12,
    serving=True,
    models=[
        wire.ModelState(
            name="fashion",
            state="probation",
            version="1.2.0",
            digest="a" * 64,
            previous_version="1.1.0",
            previous_digest="b" * 64,
            target_version="1.2.0",
            target_digest="a" * 64,
            outcome="reverted",
            reason=Reason.LATENCY_REGRESSED,
            detail="p95 12.0 ms, 3.1 ms before",
            progress=0.5,
            since_ms=NOW_MS - 1_000,
        ),
        wire.ModelState(name="keywords", state="downloading", progress=0.25),
    ],
    rejected=["c" * 64],
    at_ms=NOW_MS,
    refused="stale_generation: desired state of generation 11",
    refused_sha256="d" * 64,
)

OPERATORS = wire.Operators(
    schema=1,
    threshold=1,
    keys=[
        wire.OperatorKey(public_hex=raw_public(KEY).hex(), label="Ada"),
        wire.OperatorKey(public_hex=raw_public(SECOND_KEY).hex(), label="Grace, täglich"),
    ],
)

BENCH = BenchReport(
    schema=1,
    machine=FACTS,
    threads=1,
    rounds=10,
    reference_ms=4.75,
    results=[
        Measured(
            model="fp32.onnx",
            sha256="a" * 64,
            size_bytes=312_345,
            load_ms=21.5,
            peak_rss_bytes=71_234_567,
            p50_ms=0.75,
            p95_ms=1.125,
            cpu_ms=0.7,
            ratio=0.975,
            iterations=2_048,
        ),
        Failed(
            model="fp16.onnx",
            reason=Reason.LOAD_FAILED,
            what="fp16.onnx: the runtime has no kernel for its first node",
            next_step="leave it out",
        ),
    ],
)

TELEMETRY = wire.Telemetry(
    at_ms=NOW_MS,
    window_s=10.5,
    device={"cpu_percent": 12.5, "temperature_c": None},
    models=[
        wire.VersionTelemetry(
            name="fashion",
            version="1.2.0",
            requests=500,
            errors=1,
            rate_per_s=47.5,
            p50_ms=1.25,
            p95_ms=2.5,
            p99_ms=None,
        )
    ],
)

EVENT = wire.Event(
    at_ms=NOW_MS,
    kind="reverted",
    model="fashion",
    version="1.2.0",
    reason=Reason.GOLDEN_MISMATCH,
    detail="logits differ at 3 of 16 samples",
)

# Golden file (without .json) → value.
ALL: dict[str, Any] = {
    "manifest": MANIFEST,
    "encodings": ENCODINGS,
    "facts": FACTS,
    "profile": PROFILE,
    "presence": wire.Presence(schema=1, status="offline", session=41, at_ms=NOW_MS),
    "birth": wire.Birth(schema=1, session=42, facts=FACTS, metrics=["cpu_percent"], at_ms=NOW_MS),
    "state": STATE,
    "desired": DESIRED,
    "command": COMMAND,
    "result": wire.Result(
        schema=1,
        id="c0ffee-1",
        ok=False,
        reason=Reason.NO_PREVIOUS,
        what="fashion has no version before 1.2.0",
        next_step="deploy the version to go back to",
        at_ms=NOW_MS,
        data={"model": "fashion", "tried": [1, 2.5, None, True]},
    ),
    "record": wire.Record(
        schema=1,
        stream="event",
        epoch="5f3a",
        seq=9,
        lost=2,
        payload=canonical.parse(canonical.to_bytes(EVENT)),
        gone=[wire.Gone("tel", "5f3a", 3, 4, acked=2)],
        acked=5,
    ),
    "ack": wire.Ack(schema=1, stream="tel", epoch="5f3a", seq=9, resend=True, have=[(12, 30), (32, 32)]),
    "telemetry": TELEMETRY,
    "event": EVENT,
    "operators": OPERATORS,
    "envelope": canonical.from_bytes(
        dsse.sign(canonical.to_bytes(DESIRED), wire.DESIRED_TYPE, [KEY, SECOND_KEY]), dsse.Envelope
    ),
    "bench": BENCH,
}


def signed(
    message: wire.Desired | wire.Command, *keys: Ed25519PrivateKey, payload_type: str | None = None
) -> bytes:
    """The message in an envelope, as an operator sends it."""
    kind = wire.DESIRED_TYPE if isinstance(message, wire.Desired) else wire.COMMAND_TYPE
    return dsse.sign(canonical.to_bytes(message), payload_type or kind, list(keys or (KEY,)))


def operators(threshold: int) -> wire.Operators:
    """The two operators, so many of whom must sign."""
    return replace(OPERATORS, threshold=threshold)
