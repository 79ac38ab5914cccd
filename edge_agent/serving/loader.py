"""From a digest in the store to a version that is loaded, checked and warm. Blocking; it changes nothing.

Digests of the files were verified when the updater stored them and are not computed again here: at
start that would cost the reading of every model twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_agent.layout import Layout
from edge_agent.serving import arrays, package
from edge_agent.serving.backends.base import Loaded, Spec, open_model
from edge_agent.serving.tensors import difference
from edge_contract.errors import BundleRejected, Reason, RequestRejected
from edge_contract.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Opened:
    """A version in memory that has answered once."""

    manifest: Manifest
    digest: str
    model: Loaded


def open_version(layout: Layout, name: str, digest: str) -> Opened:
    """Load and warm up one version from the store.

    Raises RequestRejected (404) when the store does not have it, BundleRejected, DeviceUnfit or
    StorageFault when it cannot be served.
    """
    folder = layout.version(digest)
    if not folder.is_dir():
        raise RequestRejected(
            404, Reason.NOT_FOUND, f"version {digest[:12]}… is not in the store", "deploy it first"
        )
    stored = package.read(folder)
    _check_identity(stored, name, digest)
    package.check_sizes(stored)
    opened = open_package(stored, stored.model)
    try:
        _warm_up(opened, arrays.golden_samples(stored.golden, stored.manifest, 1)[0])
    except BundleRejected:
        opened.model.close()
        raise
    return opened


def open_package(stored: package.Package, path: Path) -> Opened:
    """Load the model of a package from `path` and hold it to its manifest's interface.

    Raises BundleRejected or DeviceUnfit.
    """
    manifest = stored.manifest
    session = manifest.session
    model = open_model(Spec(path, manifest.runtime, session.threads, session.spinning))
    problem = difference(manifest.inputs, model.inputs) or difference(manifest.outputs, model.outputs)
    if problem:
        model.close()
        raise BundleRejected(
            Reason.MANIFEST_INVALID,
            f"the manifest of {manifest.name}@{manifest.version} {problem}",
            "build the bundle again with edge-optimize and publish it anew",
        )
    return Opened(manifest, stored.digest, model)


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


def _warm_up(opened: Opened, golden: arrays.Golden) -> None:
    try:
        outputs = opened.model.run(golden.inputs)
    except RequestRejected as e:
        raise BundleRejected(
            Reason.LOAD_FAILED, f"the first golden sample: {e.what}", "build the bundle again"
        ) from e
    for tensor in opened.manifest.outputs:
        if not isinstance(outputs.get(tensor.name), np.ndarray):
            raise BundleRejected(
                Reason.LOAD_FAILED, f"the model gives no tensor {tensor.name!r}", "build the bundle again"
            )
