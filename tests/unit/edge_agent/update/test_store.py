"""The store: version folders by digest, the links that say what serves, and what is collected."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from edge_agent.config import Config
from edge_agent.layout import MANIFEST, Layout
from edge_agent.update.journal import Ref
from edge_agent.update.store import Store, file_matches, hash_file
from edge_contract.errors import BundleRejected, Reason
from tests.support.models import BundleOnDisk, make_bundle


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[BundleOnDisk]:
    """1.0.0 to 3.0.0. Their golden files and weights differ; a padding of 50 kB is the same in all."""
    folder = tmp_path_factory.mktemp("bundles")
    return [
        make_bundle(folder, version=f"{n}.0.0", release=n, seed=n, padding_bytes=50_000) for n in (1, 2, 3)
    ]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(Config(tenant="t", device="d", state_dir=str(tmp_path / "state")))


@pytest.fixture
def store(layout: Layout) -> Store:
    return Store(layout)


def add(store: Store, layout: Layout, bundle: BundleOnDisk) -> str:
    """As the fetch child does: what the store has is linked, the rest is staged."""
    sources = {}
    for blob in bundle.manifest.files:
        known = store.find_blob(blob)
        if known is None:
            known = layout.staging / blob.sha256
            known.write_bytes(bundle.blob(blob.role).read_bytes())
        sources[blob.sha256] = known
    return store.add(bundle.manifest, sources)


def ref(bundle: BundleOnDisk) -> Ref:
    return Ref(bundle.manifest.version, bundle.digest)


def test_a_version_is_stored_under_its_digest_with_files_by_name(
    store: Store, layout: Layout, bundles: list[BundleOnDisk]
) -> None:
    v1 = bundles[0]
    assert not store.has(v1.digest)
    assert add(store, layout, v1) == v1.digest
    assert store.has(v1.digest)
    assert store.manifest_of(v1.digest) == v1.manifest
    folder = layout.version(v1.digest)
    assert {p.name for p in folder.iterdir()} == {MANIFEST, *(f.name for f in v1.manifest.files)}
    for file in v1.manifest.files:
        assert hashlib.sha256((folder / file.name).read_bytes()).hexdigest() == file.sha256
    assert [p.name for p in layout.staging.iterdir() if p.is_dir()] == []


def test_the_same_blob_is_on_the_disk_once(store: Store, layout: Layout, bundles: list[BundleOnDisk]) -> None:
    inodes = []
    for bundle in bundles[:2]:
        add(store, layout, bundle)
        inodes.append((layout.version(bundle.digest) / "padding.bin").stat().st_ino)
    assert inodes[0] == inodes[1]
    models = {(layout.version(b.digest) / "model.onnx").stat().st_ino for b in bundles[:2]}
    assert len(models) == 2


def test_adding_what_is_there_changes_nothing(
    store: Store, layout: Layout, bundles: list[BundleOnDisk]
) -> None:
    add(store, layout, bundles[0])
    before = layout.version(bundles[0].digest).stat()
    add(store, layout, bundles[0])
    after = layout.version(bundles[0].digest).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def damaged(folder: Path, how: str) -> None:
    match how:
        case "flipped bit":
            data = bytearray((folder / "model.onnx").read_bytes())
            data[len(data) // 2] ^= 1
            (folder / "model.onnx").write_bytes(data)
        case "zeroed":
            (folder / "model.onnx").write_bytes(b"\0" * (folder / "model.onnx").stat().st_size)
        case "cut":
            (folder / "golden.npz").write_bytes(b"")
        case "missing":
            (folder / "model.onnx").unlink()
        case "manifest cut":
            (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes()[:-1])
        case "manifest missing":
            (folder / MANIFEST).unlink()


DAMAGE = ["flipped bit", "zeroed", "cut", "missing", "manifest cut", "manifest missing"]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_version_is_not_whole_and_is_replaced(
    store: Store, layout: Layout, bundles: list[BundleOnDisk], how: str
) -> None:
    v1 = bundles[0]
    add(store, layout, v1)
    for path in layout.staging.iterdir():
        path.unlink()  # or the damage would hit the same inode there
    damaged(layout.version(v1.digest), how)
    assert not store.has(v1.digest)
    add(store, layout, v1)
    assert store.has(v1.digest)


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_no_source_for_another_version(
    store: Store, layout: Layout, bundles: list[BundleOnDisk], how: str
) -> None:
    v1 = bundles[0]
    add(store, layout, v1)
    damaged(layout.version(v1.digest), how)
    role = "golden" if how == "cut" else "model"
    assert store.find_blob(v1.manifest.file(role)) is None


@pytest.mark.parametrize("how", ["manifest cut", "manifest missing"])
def test_a_version_without_its_manifest_is_named(
    store: Store, layout: Layout, bundles: list[BundleOnDisk], how: str
) -> None:
    add(store, layout, bundles[0])
    store.point("tiny", ref(bundles[0]), None)
    damaged(layout.version(bundles[0].digest), how)
    with pytest.raises(BundleRejected, match=bundles[0].digest[:12]) as fault:
        store.manifest_of(bundles[0].digest)
    assert fault.value.reason is Reason.DIGEST_MISMATCH
    assert store.current("tiny") is None


def test_a_folder_of_a_cut_off_build_is_no_obstacle(
    store: Store, layout: Layout, bundles: list[BundleOnDisk]
) -> None:
    left = layout.staging / f"{bundles[0].digest}.building"
    left.mkdir()
    (left / "model.onnx").write_text("half")
    add(store, layout, bundles[0])
    assert store.has(bundles[0].digest)
    assert not left.exists()


def test_links_say_what_serves_and_what_served_before(
    store: Store, layout: Layout, bundles: list[BundleOnDisk]
) -> None:
    v1, v2 = (ref(b) for b in bundles[:2])
    for bundle in bundles[:2]:
        add(store, layout, bundle)
    assert (store.current("tiny"), store.previous("tiny"), store.names()) == (None, None, [])
    store.point("tiny", v1, None)
    assert (store.current("tiny"), store.previous("tiny"), store.names()) == (v1, None, ["tiny"])
    store.point("tiny", v2, v1)
    assert (store.current("tiny"), store.previous("tiny")) == (v2, v1)
    assert (layout.current("tiny") / "model.onnx").is_file()  # the link leads somewhere
    store.point("tiny", v1, None)
    assert (store.current("tiny"), store.previous("tiny")) == (v1, None)
    store.point("tiny", None, None)
    assert (store.current("tiny"), store.names()) == (None, [])


def test_a_cut_between_the_two_links_never_loses_the_version_before(
    store: Store, layout: Layout, bundles: list[BundleOnDisk], monkeypatch: pytest.MonkeyPatch
) -> None:
    v1, v2, v3 = (ref(b) for b in bundles)
    for bundle in bundles:
        add(store, layout, bundle)
    store.point("tiny", v2, v1)
    swaps = []
    original = Store._set

    def cut_off(self: Store, link: Path, to: Ref | None) -> None:
        if swaps:
            raise KeyboardInterrupt
        swaps.append(link.name)
        original(self, link, to)

    monkeypatch.setattr(Store, "_set", cut_off)
    with pytest.raises(KeyboardInterrupt):
        store.point("tiny", v3, v2)
    assert swaps == ["previous"]
    assert (store.current("tiny"), store.previous("tiny")) == (v2, v2)


def test_collect_keeps_what_links_or_attempts_name(
    store: Store, layout: Layout, bundles: list[BundleOnDisk]
) -> None:
    v1, v2, v3 = (ref(b) for b in bundles)
    for bundle in bundles:
        add(store, layout, bundle)
    store.point("tiny", v2, v1)
    assert store.collect({v3.digest}) == []
    assert store.collect(set()) == [v3.digest]
    assert {p.name for p in layout.store.iterdir()} == {v1.digest, v2.digest}
    store.point("tiny", v2, None)
    assert store.collect(set()) == [v1.digest]
    assert store.has(v2.digest)  # its padding was a hard link of the one just removed


def test_collect_removes_what_cut_off_removals_left(
    store: Store, layout: Layout, bundles: list[BundleOnDisk]
) -> None:
    add(store, layout, bundles[0])
    store.point("tiny", ref(bundles[0]), None)
    (layout.store / f".{'f' * 64}.tmp" / "deep").mkdir(parents=True)
    store.collect(set())
    assert [p.name for p in layout.store.iterdir()] == [bundles[0].digest]


def test_collect_counts_links_of_all_models(
    store: Store, layout: Layout, bundles: list[BundleOnDisk]
) -> None:
    for bundle in bundles:
        add(store, layout, bundle)
    store.point("one", ref(bundles[0]), None)
    store.point("two", ref(bundles[1]), ref(bundles[2]))
    assert store.collect(set()) == []


def test_hashes_of_files(tmp_path: Path, bundles: list[BundleOnDisk]) -> None:
    blob = bundles[0].manifest.file("model")
    assert file_matches(bundles[0].blob("model"), blob)
    assert not file_matches(bundles[0].blob("golden"), blob)
    assert not file_matches(tmp_path / "missing", blob)
    assert hash_file(tmp_path / "missing") == ""
