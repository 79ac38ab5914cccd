"""Reading a registry: which versions are published and who may sign for devices. All of it verified.

It works alike on a folder and a URL; see trust.py for how.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edge_contract import canonical, wire
from edge_contract.errors import BundleRejected, EdgewardError, InputRejected, Reason
from edge_contract.manifest import Manifest, blob_path, from_bytes, target_name
from fleet.registry import approvals, trust
from fleet.registry.shelves import is_model, model_of


@dataclass(frozen=True, slots=True)
class Published:
    """One published version: its manifest and the digest of the manifest's bytes."""

    manifest: Manifest
    sha256: str
    team: str | None = None
    approved_by: Sequence[str] = ()


class Reader:
    """A registry's verified metadata. Construct, then ask."""

    def __init__(self, location: str, root: bytes) -> None:
        """Raises what trust.read raises."""
        self.catalogue = trust.read(location, root)

    def published(self, model: str | None = None) -> list[Published]:
        """Every version, or one model's, by model and release. Raises TransferFailed or BundleRejected."""
        found = [
            replace(
                decode_manifest(self._blob(target), target),
                team=self.catalogue.team_of(name),
                approved_by=self._approvers(name, target),
            )
            for name, target in self.catalogue.targets.items()
            if is_model(name) and model in (None, model_of(name))
        ]
        return sorted(found, key=lambda p: (p.manifest.name, p.manifest.release))

    def find(self, name: str, version: str) -> str:
        """The manifest's digest of `name`@`version`. Raises InputRejected naming what there is."""
        target = self.catalogue.find(target_name(name, version))
        if target is not None:
            return target.sha256
        self._refuse_pending(name, version)
        versions = [p.manifest.version for p in self.published(name)]
        have = f"it has {', '.join(versions)}" if versions else "it has no version of this model"
        raise InputRejected(
            Reason.NOT_PUBLISHED,
            f"{name}@{version} is not in the registry {self.catalogue.location}; {have}",
            "publish it with `edge-fleet registry publish`, or name a version from `registry list`",
        )

    def operators(self) -> wire.Operators:
        """Who may sign desired states and commands. Raises BundleRejected."""
        target = self.catalogue.find(wire.OPERATORS_TARGET)
        if target is None:
            raise BundleRejected(
                Reason.TRUST_FAILED,
                f"{self.catalogue.location}: the registry names no operators",
                "make the registry with `edge-fleet registry init`",
            )
        try:
            return canonical.from_bytes(self._blob(target), wire.Operators)
        except canonical.DecodeFault as e:
            raise BundleRejected(
                Reason.TRUST_FAILED,
                f"{self.catalogue.location}: {wire.OPERATORS_TARGET}: {e.problem} at {e.path}",
                "see `edge-fleet registry keys list`, and change them with `keys add` and `keys remove`",
            ) from e

    def pending(self) -> tuple[list[tuple[approvals.Pending, approvals.Policy]], list[str]]:
        """Versions that await approvals, and what is wrong with others; only a folder shows them.

        Nothing there is signed as a whole, so that one bad folder says nothing about the rest.
        """
        if trust.is_url(self.catalogue.location):
            return [], []
        folder = Path(self.catalogue.location, "pending")
        found, problems = [], []
        for name, version in approvals.every(folder):
            try:
                policy = self.catalogue.policy_for(target_name(name, version))
                found.append((approvals.read(folder, name, version, policy), policy))
            except EdgewardError as e:
                problems.append(f"pending/{name}{'@' * bool(version)}{version}: {e}")
        return found, problems

    def _refuse_pending(self, name: str, version: str) -> None:
        for found, policy in self.pending()[0]:
            if (found.manifest.name, found.manifest.version) == (name, version):
                raise InputRejected(
                    Reason.NOT_PUBLISHED,
                    f"{name}@{version} awaits approvals: it has {len(found.given)} of {policy.needed}",
                    "approve it with `edge-fleet registry approve`, then `registry publish --finish`",
                )

    def _approvers(self, name: str, target: trust.Target) -> Sequence[str]:
        """Those named today whose approval was published with a version, verified."""
        proof = self.catalogue.custom(name).get(approvals.FIELD)
        if not proof:
            return ()
        policy = self.catalogue.policy_for(name)
        envelopes = approvals.unpack(self._blob(trust.Target(proof["length"], proof["sha256"])))
        manifest = from_bytes(self._blob(target))
        return approvals.labels(approvals.count(envelopes, manifest, target.sha256, policy), policy)

    def _blob(self, target: trust.Target) -> bytes:
        return self.catalogue.blob(blob_path(target.sha256), target)


def decode_manifest(data: bytes, target: trust.Target) -> Published:
    """A published manifest. Raises BundleRejected."""
    return Published(from_bytes(data), target.sha256)


def root_of(location: str, root: Path | None) -> bytes:
    """The pinned root to verify with: the file given, or the folder's own copy.

    A URL needs a file, because a root from the same place proves nothing. Raises InputRejected.
    """
    if root is None and trust.is_url(location):
        raise InputRejected(
            Reason.BAD_INPUT,
            f"{location}: a registry by URL is verified from a pinned root, and none was given",
            "give --root FILE with the registry's root.json, had from its maker",
        )
    path = Path(location, "root.json") if root is None else root
    try:
        return path.read_bytes()
    except OSError as e:
        if root is None:
            raise trust.no_registry(Path(location)) from e
        raise InputRejected(
            Reason.BAD_INPUT,
            f"{path}: the pinned root cannot be read ({e.strerror})",
            "name the registry's root.json with --root",
        ) from e
