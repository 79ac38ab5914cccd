"""Documents that signed metadata names by digest: the operators' keys, manifests, encodings.

It checks what they say of themselves. Where their bytes come from, the registry or a medium brought by hand,
is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_agent.update.trust import Target, Trust
from edge_contract import canonical, encodings, manifest, wire
from edge_contract.errors import BundleRejected, Reason, TransferFailed

# The bytes of a target, whatever they are; they are checked here.
Read = Callable[[Target], bytes]


def operators(trust: Trust, read: Read) -> bytes:
    """Who may sign desired states and commands, as the file that is cached. Raises BundleRejected."""
    target = trust.target(wire.OPERATORS_TARGET)
    if target is None:
        raise BundleRejected(
            Reason.TRUST_FAILED,
            "the registry names no operators",
            "make the registry with `edge-fleet registry init`, which publishes their keys",
        )
    data = _bytes(target, read)
    wire.decode(data, wire.Operators)
    return data


def version(trust: Trust, read: Read, name: str, version: str, digest: str) -> manifest.Manifest:
    """The manifest of `name`@`version`, which must be that of `digest`.

    Raises TransferFailed when it is not published, BundleRejected when it is another or says something else.
    """
    label = f"{name}@{version}"
    target = published(trust, name, version)
    if target.sha256 != digest:
        raise BundleRejected(
            Reason.TRUST_FAILED,
            f"desired state names {label} as {digest[:12]}…, signed metadata as {target.sha256[:12]}…",
            "deploy again; if this repeats, operator and registry disagree on what was published",
        )
    found = manifest.from_bytes(_bytes(target, read))
    if (found.name, found.version) != (name, version):
        raise BundleRejected(
            Reason.MANIFEST_INVALID,
            f"the manifest published as {label} calls itself {found.name}@{found.version}",
            "publish the bundle under its own name",
        )
    if canonical.sha256_hex(manifest.to_bytes(found)) != digest:
        raise BundleRejected(
            Reason.MANIFEST_INVALID,
            f"the manifest of {label} is not in its canonical form",
            "publish the bundle as edge-optimize wrote it",
        )
    return found


def encodings_of(
    trust: Trust, read: Read, found: manifest.Manifest, digest: str
) -> encodings.Encodings | None:
    """What is on offer for the blobs of a version; None when nothing is. Raises BundleRejected."""
    target = trust.target(encodings.target_name(found.name, found.version))
    if target is None:
        return None
    offers = encodings.from_bytes(_bytes(target, read))
    if offers.manifest_sha256 != digest:
        raise BundleRejected(
            Reason.MANIFEST_INVALID,
            f"the encodings published for {found.name}@{found.version} are those of another version",
            "make them anew with `edge-fleet registry deltas`",
        )
    return offers


def published(trust: Trust, name: str, version: str) -> Target:
    """What signed metadata says of a version's manifest. Raises TransferFailed when it names none."""
    target = trust.target(manifest.target_name(name, version))
    if target is None:
        raise TransferFailed(
            Reason.NOT_PUBLISHED,
            f"{name}@{version} is not in the registry's signed metadata",
            "publish it with `edge-fleet registry publish`; the device looks again by itself",
        )
    return target


def _bytes(target: Target, read: Read) -> bytes:
    if target.length > manifest.LIMIT_BYTES:
        raise BundleRejected(
            Reason.MANIFEST_INVALID,
            f"a signed document of {target.length} bytes is over the limit of {manifest.LIMIT_BYTES}",
            "publish a smaller manifest",
        )
    data = read(target)
    if canonical.sha256_hex(data) != target.sha256:
        raise TransferFailed(
            Reason.DIGEST_MISMATCH, f"file {target.sha256[:12]}… is damaged", "it is fetched again"
        )
    return data
