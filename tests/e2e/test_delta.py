"""An update by patches as a device lives it, counted at the web server; and what it does when they fail."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edge_contract import wire
from edge_contract.manifest import blob_path
from tests.e2e.conftest import MakeSite, Site
from tests.support import weights
from tests.support.models import BundleOnDisk, samples
from tests.support.registry_folder import tamper


@pytest.fixture(scope="module")
def site(make_module_site: MakeSite) -> Site:
    return make_module_site()


def install_first(site: Site, name: str) -> tuple[BundleOnDisk, BundleOnDisk]:
    """A model's first version, served; and its second, published with patches and not yet wanted."""
    v1 = weights.bundle(site.folder, name, 1)
    v2 = weights.bundle(site.folder, name, 2, change=0.01)
    site.registry.publish(v1, "auto")
    site.install(v1)
    site.registry.publish(v2, "auto")
    site.server.seen.clear()
    return v1, v2


def fetched_bytes(site: Site, bundle: BundleOnDisk) -> int:
    """Bytes of blobs that crossed the network for a version; its documents are not counted."""
    documents = {f"/{blob_path(bundle.digest)}"}
    paths = {seen.path for seen in site.server.seen if seen.path.startswith("/blobs/")} - documents
    return sum((site.registry.folder / path.lstrip("/")).stat().st_size for path in paths)


def assert_serves(site: Site, bundle: BundleOnDisk, change: float) -> None:
    """By digest, and by answers that were computed without a runtime."""
    status = site.device.model(bundle.manifest.name)
    assert status["serves"] == {"version": bundle.manifest.version, "digest": bundle.digest}
    x = samples(4, features=4096)
    expected = weights.answers(x, change=change)
    np.testing.assert_allclose(site.device.scores(bundle.manifest.name, x), expected, rtol=1e-3)


def told(site: Site, name: str) -> str:
    """What the device said of the fetch of the newest version."""
    details = [event.detail for event in site.operator.events("update") if event.model == name]
    return [detail for detail in details if detail.startswith("preflight")][-1]


def test_a_device_reports_what_it_reads(site: Site) -> None:
    operator = site.operator
    birth = operator.wait(lambda: operator.last(operator.topics.birth, wire.Birth), "the birth")
    assert birth is not None
    assert set(birth.facts.encodings) == {"lanes", "zstd", "zstd-patch"}


def test_an_update_by_patches_costs_a_small_part(site: Site, name: str) -> None:
    _, v2 = install_first(site, name)
    site.install(v2)
    assert_serves(site, v2, 0.01)
    assert fetched_bytes(site, v2) < 0.05 * v2.manifest.size_bytes
    assert "instead of" in told(site, name)
    assert list(site.device.layout.staging.glob("[!.]*")) == []


def test_patches_that_were_tampered_with_cost_the_whole(site: Site, name: str) -> None:
    _, v2 = install_first(site, name)
    for blob in v2.manifest.files:
        for path in _patches(site, v2, blob.sha256):
            tamper(site.registry.folder / path)
    site.install(v2)
    assert_serves(site, v2, 0.01)
    assert fetched_bytes(site, v2) > 0.8 * v2.manifest.size_bytes
    assert "not by an encoding: model.onnx" in told(site, name)


def _patches(site: Site, bundle: BundleOnDisk, sha256: str) -> list[str]:
    """Paths of what a blob is offered as, by the signed list."""
    for path in (site.registry.folder / "blobs").rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        if data.startswith(b'{"blobs":') and bundle.digest.encode() in data:
            blobs = [b for b in json.loads(data)["blobs"] if b["sha256"] == sha256]
            return [blob_path(e["sha256"]) for b in blobs for e in b["encodings"] if "base_sha256" in e]
    raise AssertionError("no list of encodings")
