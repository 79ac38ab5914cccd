"""A registry's folder signed with python-tuf's own classes: everything that TUF allows and ours need not do.

Thresholds, rotations of any role, delegations, hash bins, any version, any time of signing. What is
attributes here is what is signed by the next `sign`. Blobs lie where a device looks for them.
"""

from __future__ import annotations

import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]
from tuf.api.metadata import (  # type: ignore[attr-defined]
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Signed,
    Snapshot,
    SuccinctRoles,
    TargetFile,
    Targets,
    Timestamp,
)

from edge_contract import canonical, wire
from edge_contract.manifest import blob_path, target_name
from tests.support.models import BundleOnDisk

TOP = ("root", "targets", "snapshot", "timestamp")
YEAR_S = 365 * 86400


class TufRepository:
    """`folder` holds `metadata/` and `blobs/`; `root` is the file to pin, the first root of all."""

    def __init__(self, folder: Path, *, now_s: float | None = None, root_keys: int = 1) -> None:
        self.folder = folder
        self.root_path = folder.parent / f"{folder.name}-root.json"
        self.now_s = time.time() if now_s is None else now_s
        self.lifetime_s = {"root": YEAR_S, "targets": YEAR_S, "snapshot": YEAR_S, "timestamp": YEAR_S}
        self.says_when = True
        self.root = Root(consistent_snapshot=True)
        self.targets = Targets()
        self.delegated: dict[str, Targets] = {}
        self.snapshot, self.timestamp = Snapshot(), Timestamp()
        self.signers: dict[str, list[CryptoSigner]] = {}
        self.operators: list[Ed25519PrivateKey] = [Ed25519PrivateKey.generate()]
        self.operator_threshold = 1
        (folder / "metadata").mkdir(parents=True)
        for role in TOP:
            self._new_keys(role, root_keys if role == "root" else 1)
        self.root.roles["root"].threshold = min(2, root_keys)
        self.sign_root(bump=False)
        self.root_path.write_bytes((folder / "metadata" / "1.root.json").read_bytes())
        self.sign(bump=False)

    def publish(self, *bundles: BundleOnDisk, role: str = "targets") -> None:
        """Add bundles to what a role signs, and sign."""
        for bundle in bundles:
            for file in bundle.manifest.files:
                self.blob((bundle.folder / blob_path(file.sha256)).read_bytes())
            name = target_name(bundle.manifest.name, bundle.manifest.version)
            self.add(name, (bundle.folder / "manifest.json").read_bytes(), role)
        self.sign()

    def add(self, name: str, data: bytes, role: str = "targets") -> None:
        """Name a file in the targets of a role; it is signed by the next `sign`."""
        self.blob(data)
        targets = self.targets if role == "targets" else self.delegated[role]
        targets.targets[name] = TargetFile(len(data), {"sha256": canonical.sha256_hex(data)}, name)

    def blob(self, data: bytes) -> Path:
        """Lay a file where a device looks for its digest."""
        path = self.folder / blob_path(canonical.sha256_hex(data))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def rotate(self, role: str, *, count: int = 1, threshold: int = 1) -> None:
        """New keys instead of the old ones, in the next root, which old and new root keys sign."""
        old = self.signers["root"]
        for signer in self.signers[role]:
            self.root.revoke_key(signer.public_key.keyid, role)
        self._new_keys(role, count)
        self.root.roles[role].threshold = threshold
        self.sign_root(extra=old if role == "root" else [])

    def sign_root(self, *, bump: bool = True, extra: list[CryptoSigner] | None = None) -> None:
        """The next root."""
        if bump:
            self.root.version += 1
        self._write(
            f"{self.root.version}.root.json", self.root, "root", [*self.signers["root"], *(extra or [])]
        )

    def delegate(self, role: str, *patterns: str) -> None:
        """A role of its own key for the targets of these patterns."""
        self._delegations().roles = {
            **(self._delegations().roles or {}),
            role: DelegatedRole(role, [], 1, terminating=True, paths=list(patterns)),
        }
        self._delegate_to(role)

    def hash_bins(self, bits: int, prefix: str = "bin") -> list[str]:
        """All targets in bins by the digest of their names; returns the bins' roles."""
        succinct = SuccinctRoles([], 1, bits, prefix)
        self.targets.delegations = Delegations({}, succinct_roles=succinct)
        signer = CryptoSigner(Ed25519PrivateKey.generate())
        roles = list(succinct.get_roles())
        self.targets.add_key(signer.public_key)
        for role in roles:
            self.signers[role], self.delegated[role] = [signer], Targets()
        return roles

    def sign(self, *, bump: bool = True) -> None:
        """Targets, snapshot and timestamp anew, a version higher."""
        self.add(wire.OPERATORS_TARGET, self.operators_document())
        for name, targets in {"targets": self.targets, **self.delegated}.items():
            if bump and f"{name}.json" in self.snapshot.meta:
                targets.version += 1
            self._write(f"{targets.version}.{name}.json", targets, name)
            self.snapshot.meta[f"{name}.json"] = MetaFile(targets.version)
        self.sign_online(bump=bump)

    def sign_online(self, *, bump: bool = True, signed_at: object = None) -> None:
        """Snapshot and timestamp anew; `signed_at` instead of the time of signing."""
        self.snapshot.version += bump
        self._write(f"{self.snapshot.version}.snapshot.json", self.snapshot, "snapshot")
        self.timestamp.version += bump
        self.timestamp.snapshot_meta = MetaFile(self.snapshot.version)
        fields = self.timestamp.unrecognized_fields
        fields.pop(wire.SIGNED_AT, None)
        if self.says_when:
            fields[wire.SIGNED_AT] = int(self.now_s) if signed_at is None else signed_at
        self._write("timestamp.json", self.timestamp, "timestamp")

    def operators_document(self) -> bytes:
        """Who may sign desired states and commands."""
        keys = [
            wire.OperatorKey(key.public_key().public_bytes_raw().hex(), "tests") for key in self.operators
        ]
        return canonical.to_bytes(wire.Operators(1, self.operator_threshold, keys))

    def copy_files(self, folder: Path) -> Path:
        """What is published now, to be served again later."""
        shutil.copytree(self.folder, folder)
        return folder

    def _new_keys(self, role: str, count: int) -> None:
        self.signers[role] = [CryptoSigner(Ed25519PrivateKey.generate()) for _ in range(count)]
        for signer in self.signers[role]:
            self.root.add_key(signer.public_key, role)

    def _delegations(self) -> Delegations:
        if self.targets.delegations is None:
            self.targets.delegations = Delegations({}, roles={})
        return self.targets.delegations

    def _delegate_to(self, role: str) -> None:
        signer = CryptoSigner(Ed25519PrivateKey.generate())
        self.targets.add_key(signer.public_key, role)
        self.signers[role], self.delegated[role] = [signer], Targets()

    def _write(self, name: str, signed: Signed, role: str, signers: list[CryptoSigner] | None = None) -> None:
        lifetime_s = self.lifetime_s.get(role, self.lifetime_s["targets"])
        signed.expires = datetime.fromtimestamp(int(self.now_s + lifetime_s), UTC)
        document = Metadata(signed)
        for signer in signers or self.signers[role]:
            document.sign(signer, append=True)
        (self.folder / "metadata" / name).write_bytes(document.to_bytes())


def at(days: float) -> float:
    """So many days from now, Unix seconds."""
    return time.time() + timedelta(days=days).total_seconds()
