"""Pure: what a device is (facts, found on it) and what it should be served (profile, written by people).

The optimizer reads profiles; the agent reports facts; a bundle's needs are checked against facts.
Probing a machine is not done here: see edge_agent/facts.py.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Annotated, Literal

from msgspec import Meta, Struct

from edge_contract.errors import DeviceUnfit, Reason
from edge_contract.manifest import Manifest, Name, Needs, Positive, Runtime, Session, Size

Architecture = Literal["aarch64", "armv7l", "x86_64"]
IntType = Literal["int8", "uint8"]
# Recipe families, in the words of the field; optimizer/recipes.py turns them into candidates.
RecipeName = Literal["fp32", "fp16", "dynamic_int8", "static_int8"]

# Instruction sets that decide which kernels a runtime picks, in groups that do the same work: VNNI in
# either encoding and AMX all multiply INT8 several times faster than FP32. Two machines that have
# something of the same groups rank candidates alike, so a measurement on one speaks for the other.
KERNEL_GROUPS: tuple[frozenset[str], ...] = (
    frozenset({"avx2"}),
    frozenset({"avx512f"}),
    frozenset({"avx_vnni", "avx512_vnni", "amx_int8"}),
    frozenset({"neon"}),
    frozenset({"asimddp", "i8mm"}),
    frozenset({"asimdhp"}),
    frozenset({"sve"}),
)
KERNEL_ISA: frozenset[str] = frozenset().union(*KERNEL_GROUPS)


class _Strict(Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Budget(_Strict, frozen=True):
    """Limits a candidate must keep. None means no limit."""

    latency_p95_ms: Positive | None = None
    memory_bytes: Size | None = None
    size_bytes: Size | None = None


class Quantization(_Strict, frozen=True):
    """What the device's kernels like. `prefer` orders recipes where no measurement can decide."""

    activations: IntType
    prefer: Annotated[list[RecipeName], Meta(min_length=1)]
    weights: IntType = "int8"
    per_channel: bool = True
    reduce_range: bool = False
    fp16: bool = False


class Profile(_Strict, frozen=True):
    """A kind of device, as a TOML file describes it."""

    schema: Literal[1]
    name: Name
    title: str
    runtime: Runtime
    architecture: Architecture
    isa: list[str]
    memory_bytes: Size
    session: Session
    budget: Budget
    quantization: Quantization
    runtime_min_version: str = "0"

    def needs(self, memory_bytes: int) -> Needs:
        """The needs of a bundle made for this profile."""
        return Needs(
            memory_bytes=memory_bytes,
            architectures=[self.architecture],
            isa=sorted(self.isa),
            runtime_min_version=self.runtime_min_version,
        )


class Facts(_Strict, frozen=True):
    """What was found on one machine. `isa` uses the kernel's names from /proc/cpuinfo plus `neon`.

    `encodings` are the algorithms of edge_contract.encodings that it can decode.
    """

    architecture: str
    cpu: str
    isa: list[str]
    cores: Annotated[int, Meta(ge=1)]
    memory_bytes: Size
    os: str
    python: str
    agent_version: str
    runtimes: dict[str, str]
    encodings: list[str] = []


def speaks_for(facts: Facts, profile: Profile) -> bool:
    """Whether latencies measured on this machine rank candidates as the profile's device would."""
    if facts.architecture != profile.architecture:
        return False
    return _groups(facts.isa) == _groups(profile.isa)


def _groups(isa: list[str]) -> list[bool]:
    return [bool(group & set(isa)) for group in KERNEL_GROUPS]


def check_fit(manifest: Manifest, facts: Facts) -> None:
    """Raises DeviceUnfit naming the first need that this device does not meet."""
    needs = manifest.needs
    label = f"{manifest.name}@{manifest.version}"
    if manifest.runtime not in facts.runtimes:
        have = ", ".join(sorted(facts.runtimes)) or "none"
        raise DeviceUnfit(
            Reason.RUNTIME_MISSING,
            f"{label} needs the runtime {manifest.runtime}; this device has {have}",
            "install the matching extra of edgeward on the device, or deploy a bundle made for its profile",
        )
    found = facts.runtimes[manifest.runtime]
    if _version_key(found) < _version_key(needs.runtime_min_version):
        raise DeviceUnfit(
            Reason.RUNTIME_MISSING,
            f"{label} needs {manifest.runtime} {needs.runtime_min_version} or later; this device has {found}",
            f"upgrade {manifest.runtime} on the device",
        )
    if needs.architectures and facts.architecture not in needs.architectures:
        raise DeviceUnfit(
            Reason.DEVICE_UNFIT,
            f"{label} is for {', '.join(needs.architectures)}; this device is {facts.architecture}",
            "deploy the bundle that was optimized for this device's profile",
        )
    missing = sorted(set(needs.isa) - set(facts.isa))
    if missing:
        raise DeviceUnfit(
            Reason.DEVICE_UNFIT,
            f"{label} needs the instruction sets {', '.join(missing)}, which this CPU lacks",
            "optimize for a profile with this CPU's instruction sets",
        )
    if needs.memory_bytes > facts.memory_bytes:
        raise DeviceUnfit(
            Reason.MEMORY_TOO_SMALL,
            f"{label} needs {needs.memory_bytes} bytes of memory; this device has {facts.memory_bytes}",
            "optimize for a profile with this device's memory",
        )


def _version_key(text: str) -> tuple[int, ...]:
    numbers: list[int] = []
    for part in text.split("."):
        digits = "".join(takewhile(str.isdigit, part))
        if digits:
            numbers.append(int(digits))
        if digits != part:
            break  # "20rc1" counts as 20, and nothing after it counts
    return tuple(numbers)
