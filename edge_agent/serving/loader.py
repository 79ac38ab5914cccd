"""From a digest in the store to a version that is loaded, checked and warm. Blocking; it changes nothing.

Digests of the files were verified when the updater stored them and are computed again only where the files
are not those of then (verified.py): at each start that would cost the reading of every model twice. One
golden answer is compared.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from msgspec.structs import replace

from edge_agent import verified
from edge_agent.layout import Layout
from edge_agent.serving import arrays, golden, heap, package, prepared
from edge_agent.serving.backends.base import Loaded, Spec, open_model
from edge_agent.serving.tensors import difference
from edge_contract.errors import BundleRejected, Reason, RequestRejected
from edge_contract.manifest import Manifest

# "prepared" is this device's own form of the model (prepared.py), "original" the model of the bundle.
Form = Literal["original", "prepared"]
_log = logging.getLogger("edge_agent.serving")


@dataclass(frozen=True, slots=True)
class Opened:
    """A version in memory, and from which of its forms."""

    manifest: Manifest
    digest: str
    model: Loaded
    form: Form = "original"


def open_version(layout: Layout, name: str, digest: str, *, original: bool = False) -> Opened:
    """Load and warm up one version from the store, from its prepared form where there is a sound one.

    With `original` never from that.

    Raises RequestRejected (404) when the store does not have it, BundleRejected, DeviceUnfit, StorageFault
    or MemoryError when it cannot be served.
    """
    folder = layout.version(digest)
    if not folder.is_dir():
        raise RequestRejected(
            404, Reason.NOT_FOUND, f"version {digest[:12]}… is not in the store", "deploy it first"
        )
    verified.check(layout, digest, time.time_ns() // 1_000_000)
    stored = package.read(folder)
    _check_identity(stored, name, digest)
    mapped = None if original else prepared.find(layout.prepared, stored)
    if mapped is not None:
        try:
            return _warm(open_package(stored, mapped, "prepared"), stored)
        except BundleRejected as e:
            _log.error("the prepared form of %s is not used: %s", stored.label, e)
    try:
        return _warm(open_package(stored, stored.model), stored)
    except BundleRejected:
        package.check_digests(stored)  # where the disk is at fault, it says so, not the bundle
        raise


def open_package(stored: package.Package, path: Path, form: Form = "original") -> Opened:
    """Load the model of a package from `path` and hold it to its manifest's interface.

    Raises BundleRejected, DeviceUnfit or MemoryError.
    """
    manifest = stored.manifest
    model = open_model(spec_of(manifest, path, form))
    problem = difference(manifest.inputs, model.inputs) or difference(manifest.outputs, model.outputs)
    if problem:
        model.close()
        raise BundleRejected(
            Reason.MANIFEST_INVALID,
            f"the manifest of {stored.label} {problem}",
            "build the bundle again with edge-optimize and publish it anew",
        )
    return Opened(manifest, stored.digest, model, form)


def spec_of(manifest: Manifest, path: Path, form: Form = "original") -> Spec:
    """What a backend needs to know to open `path` as this version."""
    session = manifest.session
    return Spec(path, manifest.runtime, session.threads, session.spinning, form == "prepared")


def _check_identity(stored: package.Package, name: str, digest: str) -> None:
    if stored.digest != digest:
        raise BundleRejected(
            Reason.DIGEST_MISMATCH,
            f"the manifest in store folder {digest[:12]}… has SHA-256 {stored.digest[:12]}…",
            "remove this version from the store and let the device fetch it again",
        )
    if stored.manifest.name != name:
        raise BundleRejected(
            Reason.MANIFEST_INVALID,
            f"version {digest[:12]}… is of the model {stored.manifest.name}, not of {name}",
            "load it under its own name",
        )


def _warm(opened: Opened, stored: package.Package) -> Opened:
    """Let it answer once, and rightly: a disk that decays would otherwise be noticed by clients first."""
    try:
        _answer(opened, arrays.golden_samples(stored.golden, stored.manifest, 1)[0])
    except BundleRejected:
        opened.model.close()
        raise
    heap.give_back()
    return opened


def _answer(opened: Opened, sample: arrays.Golden) -> None:
    manifest = opened.manifest
    try:
        outputs = opened.model.run(sample.inputs)
    except RequestRejected as e:
        raise BundleRejected(
            Reason.LOAD_FAILED, f"the first golden sample: {e.what}", "build the bundle again"
        ) from e
    # The share of samples with the same top class is preflight's: one sample has no share.
    tolerance = replace(manifest.golden.tolerance, top1_agreement=0.0)
    for tensor in manifest.outputs:
        pair = golden.Pair(sample.outputs[tensor.name], outputs[tensor.name])
        finding = golden.compare(tensor, [pair], tolerance)
        if finding is not None:
            raise BundleRejected(
                finding.reason, finding.what, "deploy it again; if this repeats, build the bundle again"
            )
