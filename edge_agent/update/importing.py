"""`edge-agent import`: versions from a medium, with the trust that a registry has and no other.

It runs as a process of its own, beside the control process or without it. Metadata is verified into the same
folder and against the same floor as the registry's; manifests and blobs go, checked, into the staging folder
under their digests, where the next fetch finds them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_agent import facts, files
from edge_agent.config import Config
from edge_agent.layout import Layout
from edge_agent.update import documents, extract, operators
from edge_agent.update.extract import Extract
from edge_agent.update.floor import metadata_floor
from edge_agent.update.inbox import Inbox
from edge_agent.update.part import Part
from edge_agent.update.progress_bar import Show
from edge_agent.update.staging import Staging
from edge_agent.update.store import Store
from edge_agent.update.trust import Source, Target, Trust
from edge_contract import canonical, manifest, wire
from edge_contract.errors import (
    BundleRejected,
    DeviceUnfit,
    InputRejected,
    MessageRejected,
    Reason,
    TransferFailed,
)
from edge_contract.manifest import File, Manifest, blob_path
from edge_contract.profile import check_fit

_PART = ".import"
# So many devices are named in a message.
_NAMED = 5


@dataclass
class Imported:
    """What came: versions that are here now, those that this device cannot run, and whether an order did."""

    versions: list[str] = field(default_factory=list)
    unfit: dict[str, str] = field(default_factory=dict)
    copied_bytes: int = 0
    generation: int | None = None


def run(config: Config, path: Path, references: Sequence[str], show: Show) -> Imported:
    """Import `references` (all that the medium lists when empty).

    Raises InputRejected, TransferFailed (expired metadata, not published), BundleRejected (altered),
    DeviceUnfit (nothing on it runs here), MessageRejected (the order) or StorageFault.
    """
    layout = Layout(config)
    _check_user(layout)
    with extract.opened(path) as medium, _alone(layout):
        return _Import(config, layout, medium).run(references, show)


def sentence(done: Imported) -> str:
    """For people."""
    count = len(done.versions)
    here = "1 version is" if count == 1 else f"{count} versions are"
    lines = [f"{here} here now, {done.copied_bytes} bytes were copied"]
    lines += [f"  {label}" for label in done.versions]
    lines += [f"  {label} is not for this device: {why}" for label, why in done.unfit.items()]
    if done.generation is None:
        lines.append("the next desired state that names them needs no network")
    else:
        lines.append(
            f"desired state of generation {done.generation} handed over: see `edge-agent status`, or start "
            "the control process"
        )
    return "\n".join(lines)


def as_dict(done: Imported) -> dict[str, Any]:
    """For programs."""
    return {
        "ok": True,
        "versions": done.versions,
        "unfit": done.unfit,
        "copied_bytes": done.copied_bytes,
        "generation": done.generation,
    }


class _Import:
    def __init__(self, config: Config, layout: Layout, medium: Extract) -> None:
        self._config = config
        self._layout = layout
        self._medium = medium
        self._store = Store(layout)
        self._store.make_folders()
        self._staging = Staging(layout, self._store)
        self._done = Imported()

    def run(self, references: Sequence[str], show: Show) -> Imported:
        labels = list(references) or self._contents()
        found, operators = self._verify([_parsed(label) for label in labels])
        desired = self._desired(operators)
        missing = {
            blob.sha256: blob
            for one in found
            for blob in one.files
            if self._staging.whole(blob) is None and self._store.find_blob(blob) is None
        }
        self._copy_all(list(missing.values()), show)
        for one in found:
            self._keep(manifest.to_bytes(one))
            self._done.versions.append(f"{one.name}@{one.version}")
        Inbox(self._layout).drop(desired)
        if desired is None and (others := self._medium.orders()):
            raise self._for_others(others)
        return self._done

    def _contents(self) -> list[str]:
        data = self._medium.read(extract.CONTENTS, manifest.LIMIT_BYTES)
        try:
            labels = canonical.from_bytes(data or b"", list[str])
        except canonical.DecodeFault as e:
            raise InputRejected(
                Reason.BAD_INPUT,
                f"{self._medium.path}: {extract.CONTENTS} does not list what is on it ({e})",
                "name the versions, MODEL@VERSION, or write it anew with `edge-fleet registry export`",
            ) from e
        return labels

    def _verify(self, wanted: list[tuple[str, str]]) -> tuple[list[Manifest], wire.Operators]:
        """Manifests that fit this device. The metadata is this device's own from here on."""
        descriptor = files.lock(self._layout.trust / ".lock")
        try:
            trust = Trust(
                self._layout.trust / "metadata",
                Source(self._config.registry, self._medium, f"{extract.PREFIX}metadata/"),
                metadata_floor(self._layout),
                clock_s=time.time(),
            )
            trust.refresh()
            data = documents.operators(trust, self._document)
            operators.keep(self._layout.trust / operators.FILE, data)
            found = [self._version(trust, name, version) for name, version in wanted]
        finally:
            os.close(descriptor)
        return self._fitting(found), wire.decode(data, wire.Operators)

    def _version(self, trust: Trust, name: str, version: str) -> Manifest:
        digest = documents.published(trust, name, version).sha256
        return documents.version(trust, self._document, name, version, digest)

    def _fitting(self, found: list[Manifest]) -> list[Manifest]:
        here = facts.probe()
        fitting, refusal = [], None
        for one in found:
            try:
                check_fit(one, here)
                fitting.append(one)
            except DeviceUnfit as e:
                refusal = e
                self._done.unfit[f"{one.name}@{one.version}"] = e.what
        if refusal is not None and not fitting:
            raise refusal
        return fitting

    def _document(self, target: Target) -> bytes:
        data = self._medium.read(blob_path(target.sha256), target.length)
        if data is None:
            raise self._not_there(target.sha256)
        if canonical.sha256_hex(data) != target.sha256:
            raise self._altered(target.sha256)
        return data

    def _desired(self, operators: wire.Operators) -> bytes | None:
        """The order for this device, checked as the control process will check it again."""
        device = self._config.device
        envelope = self._medium.read(f"desired/{device}.json", wire.LIMIT_BYTES)
        if envelope is None:
            return None
        now_ms = time.time_ns() // 1_000_000
        order = wire.open_desired(
            envelope, operators, tenant=self._config.tenant, device=device, generation=0, now_ms=now_ms
        )
        self._done.generation = order.generation
        return envelope

    def _for_others(self, devices: list[str]) -> MessageRejected:
        device = self._config.device
        named = ", ".join(devices[:_NAMED]) + (", …" if len(devices) > _NAMED else "")
        came = ", ".join(self._done.versions)
        return MessageRejected(
            Reason.WRONG_AUDIENCE,
            f"{self._medium.path}: it brings orders for {named}, none for this device, {device}; {came} came",
            f"bring one that was exported with --desire {device}, or deploy to it through the broker",
        )

    def _copy_all(self, missing: list[File], show: Show) -> None:
        total = sum(blob.size_bytes for blob in missing)
        needed = total + self._config.update.disk_reserve_bytes
        if missing:
            self._staging.check_room(needed)

        def count(count: int) -> None:
            self._done.copied_bytes += count
            show(self._done.copied_bytes, total)

        for blob in missing:
            path = self._staging.folder / f"{blob.sha256}{_PART}"
            try:
                with Part(path, blob.size_bytes, count) as part:
                    part.restart()
                    self._copy(blob, part)
                    part.sync()
                files.move(path, self._staging.folder / blob.sha256)
            finally:
                files.remove_link(path)

    def _copy(self, blob: File, part: Part) -> None:
        pieces = self._medium.chunks(blob_path(blob.sha256))
        if next(pieces, None) is None:
            raise self._not_there(blob.sha256)
        for chunk in pieces:
            if part.length + len(chunk) > blob.size_bytes:
                raise self._altered(blob.sha256)
            part.append(chunk)
        if part.sha256 != blob.sha256:
            raise self._altered(blob.sha256)

    def _keep(self, data: bytes) -> None:
        files.write(self._staging.folder / canonical.sha256_hex(data), data)

    def _not_there(self, sha256: str) -> TransferFailed:
        return TransferFailed(
            Reason.BLOB_MISSING,
            f"{self._medium.path}: {blob_path(sha256)} is not on it",
            "write it anew with `edge-fleet registry export`",
        )

    def _altered(self, sha256: str) -> BundleRejected:
        return BundleRejected(
            Reason.DIGEST_MISMATCH,
            f"{self._medium.path}: {blob_path(sha256)} does not hold what signed metadata says",
            "write it anew with `edge-fleet registry export`; the medium may be worn out",
        )


def _parsed(label: str) -> tuple[str, str]:
    try:
        return manifest.parse_reference(label)
    except canonical.DecodeFault as e:
        raise InputRejected(
            Reason.BAD_INPUT, f"{label!r} is not MODEL@VERSION: {e.problem}", "write it like fashion@1"
        ) from e


def _check_user(layout: Layout) -> None:
    """What another user leaves in the state folder, the agent could not read or replace."""
    try:
        owner = layout.state.stat().st_uid
    except FileNotFoundError:
        owner = os.geteuid()
    if owner != os.geteuid():
        raise InputRejected(
            Reason.NOT_ALLOWED,
            f"{layout.state} belongs to user id {owner}, this command runs as {os.geteuid()}",
            "run it as the agent's user: `sudo -u edge-agent edge-agent import …`",
        )


@contextmanager
def _alone(layout: Layout) -> Iterator[None]:
    files.make_folder(layout.staging)
    descriptor = files.try_lock(layout.staging / ".import")
    if descriptor is None:
        raise InputRejected(Reason.NOT_ALLOWED, "another import is running here", "wait until it has ended")
    try:
        yield
    finally:
        os.close(descriptor)
