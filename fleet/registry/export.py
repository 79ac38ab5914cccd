"""Writing a part of a registry to a medium, for `edge-agent import`: the same files under the same names.

Its signed metadata is copied as it is, whole, so that a device verifies it as it does the registry's; blobs
are those of the versions that are named. Nothing is signed here but, on request, a desired state.
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_contract import canonical, dsse, wire
from edge_contract.errors import BundleRejected, InputRejected, Reason
from edge_contract.manifest import Manifest, blob_path, from_bytes, target_name
from fleet.registry import files
from fleet.registry.keys import signing_keys
from fleet.registry.reader import Reader
from fleet.registry.trust import Target

CONTENTS = "contents.json"
Kind = Literal["tar", "zip", "folder"]


@dataclass(frozen=True, slots=True)
class Export:
    """What goes onto the medium, checked: small documents by name, blobs by name and where they lie."""

    versions: Mapping[str, Target]
    expires: datetime
    expires_first: str
    documents: Mapping[str, bytes]
    blobs: Mapping[str, tuple[Path, files.Content]]

    @property
    def size_bytes(self) -> int:
        """Without the archive's own headers."""
        return sum(map(len, self.documents.values())) + sum(c.size_bytes for _, c in self.blobs.values())


def collect(folder: Path, root: bytes, references: Sequence[tuple[str, str]]) -> Export:
    """Everything that a device needs for `references`, verified from the pinned `root`.

    Raises InputRejected (not published), TransferFailed (expired), BundleRejected (altered).
    """
    reader = Reader(str(folder), root)
    documents = _metadata(folder)
    versions: dict[str, Target] = {}
    blobs: dict[str, tuple[Path, files.Content]] = {}
    for name, version in references:
        digest = reader.find(name, version)
        found = reader.catalogue.find(target_name(name, version))
        if found is None:
            raise RuntimeError(digest)
        versions[f"{name}@{version}"] = found
        data = reader.catalogue.blob(blob_path(found.sha256), found)
        documents[blob_path(found.sha256)] = data
        blobs |= _blobs(folder, from_bytes(data))
    operators = reader.catalogue.find(wire.OPERATORS_TARGET)
    if operators is not None:
        documents[blob_path(operators.sha256)] = reader.catalogue.blob(blob_path(operators.sha256), operators)
    documents[CONTENTS] = canonical.to_bytes(sorted(versions))
    catalogue = reader.catalogue
    return Export(versions, catalogue.expires, catalogue.first_to_expire, documents, blobs)


def desire(
    export: Export,
    operators: wire.Operators,
    keys: Sequence[Ed25519PrivateKey],
    *,
    tenant: str,
    devices: Iterable[str],
    generation: int,
    now_ms: int,
    expires_ms: int,
) -> dict[str, bytes]:
    """For each device an order to serve exactly the exported versions, as documents of the medium.

    Raises InputRejected: two versions of a model, too few of the operators' keys.
    """
    signers = signing_keys(operators, keys)
    models: list[wire.DesiredModel] = []
    for label, target in export.versions.items():
        name, _, version = label.partition("@")
        if any(name == m.name for m in models):
            raise InputRejected(
                Reason.BAD_INPUT,
                f"two versions of {name} are exported, and a device serves one",
                "leave one of them out, or give no --desire",
            )
        models.append(wire.DesiredModel(name, version, target.sha256))
    return {
        f"desired/{device}.json": dsse.sign(
            canonical.to_bytes(wire.Desired(1, tenant, device, generation, now_ms, expires_ms, models)),
            wire.DESIRED_TYPE,
            signers,
        )
        for device in devices
    }


def kind_of(out: Path) -> Kind:
    """By its name: `.tar`, `.zip`, else a folder."""
    kinds: dict[str, Kind] = {".tar": "tar", ".zip": "zip"}
    return kinds.get(out.suffix.lower(), "folder")


def write(export: Export, out: Path) -> None:
    """Write durably: whole under its name, or not at all. Raises InputRejected, BundleRejected, OSError."""
    kind = kind_of(out)
    if kind == "folder":
        if out.exists():
            raise InputRejected(
                Reason.BAD_INPUT, f"{out}: is there already", "name a new folder, or a .tar or .zip file"
            )
        _write_folder(export, out)
    else:
        files.place(out, lambda stream: (_write_tar if kind == "tar" else _write_zip)(export, stream))


def _write_folder(export: Export, out: Path) -> None:
    for name, data in export.documents.items():
        files.place(out / name, lambda stream, data=data: stream.write(data))  # type: ignore[misc]
    for name, (source, content) in export.blobs.items():
        files.copy(source, out / name, content)


def _write_tar(export: Export, stream: IO[bytes]) -> None:
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in export.documents.items():
            archive.addfile(_member(name, len(data)), io.BytesIO(data))
        for name, (source, content) in export.blobs.items():
            with source.open("rb") as blob:
                archive.addfile(_member(name, content.size_bytes), blob)


def _member(name: str, size_bytes: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size_bytes, 0o644
    return member


def _write_zip(export: Export, stream: IO[bytes]) -> None:
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, data in export.documents.items():
            archive.writestr(name, data)
        for name, (source, _) in export.blobs.items():
            archive.write(source, name)


def _metadata(folder: Path) -> dict[str, bytes]:
    """Every root, and what the newest timestamp leads to. It has just been verified."""
    found = {f"metadata/{p.name}": p.read_bytes() for p in (folder / "metadata").glob("*.root.json")}

    def take(name: str) -> dict[str, int]:
        data = (folder / "metadata" / name).read_bytes()
        found[f"metadata/{name}"] = data
        meta = json.loads(data)["signed"].get("meta", {})
        return {role: int(entry["version"]) for role, entry in meta.items()}

    for snapshot, version in take("timestamp.json").items():
        for role, number in take(f"{version}.{snapshot}").items():
            take(f"{number}.{role}")
    return found


def _blobs(folder: Path, manifest: Manifest) -> dict[str, tuple[Path, files.Content]]:
    found = {}
    for blob in manifest.files:
        path, expected = folder / blob_path(blob.sha256), files.Content(blob.size_bytes, blob.sha256)
        if not path.is_file() or files.content(path) != expected:
            raise BundleRejected(
                Reason.BLOB_MISSING,
                f"{path}: {blob.name} of {manifest.name}@{manifest.version} is missing or damaged",
                "publish the bundle again, then export",
            )
        found[blob_path(blob.sha256)] = (path, expected)
    return found
