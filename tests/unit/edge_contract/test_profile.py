"""Whether a bundle fits a device, and whether one machine's measurements speak for another."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from edge_contract import canonical
from edge_contract.errors import DeviceUnfit, Reason
from edge_contract.manifest import Manifest, Needs
from edge_contract.profile import Facts, Profile, check_fit, speaks_for
from tests.unit.edge_contract.samples import FACTS, MANIFEST, PROFILE


def needing(**fields: object) -> Manifest:
    return replace(MANIFEST, needs=replace(Needs(memory_bytes=0), **fields))


def test_a_bundle_that_fits() -> None:
    check_fit(MANIFEST, FACTS)
    check_fit(needing(), replace(FACTS, isa=[], memory_bytes=0))


@pytest.mark.parametrize(
    ("manifest", "facts", "reason", "culprit"),
    [
        (
            MANIFEST,
            replace(FACTS, runtimes={"tflite": "2.3.0"}),
            Reason.RUNTIME_MISSING,
            "needs the runtime onnxruntime; this device has tflite",
        ),
        (MANIFEST, replace(FACTS, runtimes={}), Reason.RUNTIME_MISSING, "this device has none"),
        (
            needing(runtime_min_version="1.21"),
            FACTS,
            Reason.RUNTIME_MISSING,
            "needs onnxruntime 1.21 or later; this device has 1.20.1",
        ),
        (needing(architectures=["aarch64", "armv7l"]), FACTS, Reason.DEVICE_UNFIT, "is for aarch64, armv7l"),
        (needing(isa=["i8mm", "avx2", "amx_int8"]), FACTS, Reason.DEVICE_UNFIT, "amx_int8, i8mm, which"),
        (needing(memory_bytes=2**40), FACTS, Reason.MEMORY_TOO_SMALL, "1099511627776 bytes of memory"),
    ],
)
def test_the_first_unmet_need_is_named(
    manifest: Manifest, facts: Facts, reason: Reason, culprit: str
) -> None:
    with pytest.raises(DeviceUnfit) as caught:
        check_fit(manifest, facts)
    assert caught.value.reason is reason
    assert caught.value.what.startswith("fashion@1.2.0 ")
    assert culprit in caught.value.what


@pytest.mark.parametrize(
    ("found", "needed", "fits"),
    [
        ("1.20.1", "1.20", True),
        ("1.20", "1.20.1", False),
        ("1.9.0", "1.10.0", False),
        ("1.32.0", "1.9", True),
        ("1.20rc1", "1.32", False),
        ("1.20.0.dev20240101", "1.20.0", True),
        ("2.3.0+cpu", "2.4", False),
        ("2.3.0", "0", True),
    ],
)
def test_versions_are_compared_by_their_numbers(found: str, needed: str, fits: bool) -> None:
    facts = replace(FACTS, runtimes={"onnxruntime": found})
    bundle = needing(runtime_min_version=needed)
    if fits:
        check_fit(bundle, facts)
    else:
        with pytest.raises(DeviceUnfit):
            check_fit(bundle, facts)


def test_a_profile_states_the_needs_of_its_bundles() -> None:
    assert PROFILE.needs(123) == Needs(
        memory_bytes=123,
        architectures=["x86_64"],
        isa=["avx2", "avx512_vnni", "avx512f"],
        runtime_min_version="1.18",
    )


def test_machines_speak_for_profiles_with_the_same_kernels() -> None:
    profile = replace(PROFILE, isa=["avx2", "avx512f", "avx512_vnni"])
    same_kernels = replace(FACTS, isa=["avx2", "avx512f", "avx512_vnni", "fma", "sse4_2"])
    assert speaks_for(same_kernels, profile)
    assert not speaks_for(replace(same_kernels, isa=["avx2", "fma"]), profile)
    assert speaks_for(replace(same_kernels, isa=[*same_kernels.isa, "amx_int8"]), profile)
    assert not speaks_for(same_kernels, replace(profile, isa=["avx2"]))
    assert not speaks_for(replace(same_kernels, architecture="aarch64"), profile)


@pytest.mark.parametrize(
    ("field", "value", "path"),
    [
        ("architecture", "riscv64", "$.architecture"),
        ("quantization", {"activations": "int8", "prefer": []}, "$.quantization.prefer"),
        ("quantization", {"activations": "int4", "prefer": ["fp32"]}, "$.quantization.activations"),
        ("quantization", {"activations": "int8", "prefer": ["int3"]}, "$.quantization.prefer[0]"),
        ("budget", {"latency_p95_ms": 0}, "$.budget.latency_p95_ms"),
        ("budget", {"latency_ms": 5}, "$.budget"),
        ("name", "Raspberry Pi", "$.name"),
        ("colour", "red", "$"),
    ],
)
def test_a_bad_profile_is_refused_by_its_field(field: str, value: object, path: str) -> None:
    plain = canonical.parse(canonical.to_bytes(PROFILE))
    with pytest.raises(canonical.DecodeFault) as caught:
        canonical.from_builtins({**plain, field: value}, Profile)
    assert caught.value.path == path
