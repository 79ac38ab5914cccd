"""A registry's current metadata, to be changed in memory and signed anew. It writes no file.

Bins before their role, roles before targets, then snapshot, then the timestamp that makes it all visible.
Signatures are verified from the pinned root on, so that nothing foreign is signed. Expiry is not: renewing
what has expired is what this is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from datetime import datetime

import msgspec
from securesystemslib.signer import Signer  # type: ignore[attr-defined]
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (  # type: ignore[attr-defined]
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    Targets,
    Timestamp,
)

from edge_contract.errors import BundleRejected, Reason
from fleet.registry import bridge, shelves, signing, tree
from fleet.registry.delegations import Editor
from fleet.registry.signers import Authority
from fleet.registry.signing import File, Payload, Periods
from fleet.registry.trust import Target, bad_root, fault, plain

Signers = Mapping[str, Sequence[Signer]]


class Draft:
    """Construct, change, then take the files of `sign_targets`, `sign_snapshot`, `sign_timestamp`."""

    def __init__(self, location: str, pinned: bytes, get: Callable[[str], bytes | None]) -> None:
        """`get` returns a metadata file's bytes by name, or None. Raises BundleRejected, InputRejected."""
        self._location = location
        self._get = get
        self._changed: set[str] = set()
        try:
            self._root = Metadata[Root].from_bytes(pinned).signed
        except (RepositoryError, ValueError) as e:
            raise bad_root(e) from e
        try:
            self._follow_root()
            self._timestamp = self._verified(Timestamp, "timestamp.json", None)
            meta = self._timestamp.snapshot_meta
            self._snapshot = self._verified(Snapshot, f"{meta.version}.snapshot.json", meta)
            meta = self._snapshot.meta["targets.json"]
            top = self._verified(Targets, f"{meta.version}.targets.json", meta)
            self.tree = tree.Tree(top, self._snapshot, lambda name, _: self._bytes(name), None)
            self.tree.load()
        except (RepositoryError, ValueError, KeyError) as e:
            raise fault(location, e) from e
        self._trusted_root = deepcopy(self._root)
        self.editor = Editor(self.tree, self.version_of, lambda: self.authority(shelves.TOP))

    # what there is

    @property
    def targets(self) -> Mapping[str, Target]:
        """What is published, and what was added."""
        return plain(self.tree.every())

    @property
    def revoked(self) -> Mapping[str, int]:
        """Target name → release of each version that was taken back.

        The registry may say so of every version, a team only of those that it answers for.
        """
        return {
            name: release
            for holder, role in self.tree.roles.items()
            for name, release in tree.revoked_of(role).items()
            if shelves.key_name(holder) in (shelves.TOP, self.tree.shelf_of(name))
        }

    @property
    def versions(self) -> Mapping[str, int]:
        """Every role that was ever signed, with its version."""
        below = {name.removesuffix(".json"): meta.version for name, meta in self._snapshot.meta.items()}
        return {**below, **{p.type: p.version for p in (self._root, self._snapshot, self._timestamp)}}

    @property
    def periods(self) -> Periods:
        """Seconds to expiry, as the signed root says. Raises BundleRejected."""
        try:
            return msgspec.convert(self._root.unrecognized_fields[signing.PERIODS], Periods)
        except (KeyError, msgspec.ValidationError) as e:
            raise fault(self._location, RepositoryError(f"the root's {signing.PERIODS}: {e}")) from e

    def authority(self, role: str) -> Authority:
        """The keys that a role is signed with, as whoever names it says."""
        name = shelves.key_name(role)
        judge = self._root if name in signing.TOP_ROLES else self.tree.top
        found = judge.get_delegated_role(name)
        return Authority({keyid: judge.get_key(keyid) for keyid in found.keyids}, found.threshold)

    def roles(self) -> list[str]:
        """The roles with keys of their own: TUF's four and the teams'."""
        return [*signing.TOP_ROLES, *(role for role in self.tree.shelves() if shelves.team_of(role))]

    def expiries(self) -> dict[str, tuple[int, datetime]]:
        """Role → version and expiry; that of a role with bins is the earliest of them."""
        found: dict[str, tuple[int, datetime]] = {}
        for payload in (self._root, self._snapshot, self._timestamp):
            found[payload.type] = (payload.version, payload.expires)
        for role, targets in self.tree.roles.items():
            if targets.version:
                name = shelves.key_name(role)
                version, expires = found.get(name, (targets.version, targets.expires))
                found[name] = (version, min(expires, targets.expires))
        return found

    def needed(self) -> set[str]:
        """Whose keys the changes so far need, snapshot and timestamp among them."""
        return {*map(shelves.key_name, self._unsigned()), "snapshot", "timestamp"}

    # changes

    def add(self, name: str, target: Target, custom: Mapping[str, object] | None = None) -> None:
        """Name one more file in the targets, or another content for it."""
        self.change(self.editor.put(name, signing.entry(name, target, custom)))

    def revoke(self, name: str, release: int) -> None:
        """Take a version back. That it was there stays known, so that it never comes back as another."""
        holder = self.editor.take(name)
        shelf = holder.partition(".")[0]
        self._note_revoked(shelf, name, release)
        self.change({holder, shelf})
        if (offers := shelves.encodings_of(name)) in self.targets:
            self.change({self.editor.take(offers)})

    def revoke_team(self, role: str, adopt: bool, releases: Mapping[str, int]) -> list[str]:
        """Take a delegation back; returns the versions that it had published.

        With `adopt` they become the registry's own, otherwise they are revoked with it.
        """
        for name, release in tree.revoked_of(self.tree.roles[role]).items():
            if self.tree.shelf_of(name) == role:
                self._note_revoked(shelves.TOP, name, release)
        mine = self.editor.dissolve(role)
        for name, target in mine.items():
            if adopt:
                self.change(self.editor.put(name, target))
            elif shelves.is_model(name):
                self._note_revoked(shelves.TOP, name, releases[name])
        self.change({shelves.TOP})
        return sorted(filter(shelves.is_model, mine))

    def change(self, roles: set[str]) -> None:
        """These roles are to be signed anew. Raises BundleRejected for a team that was left out."""
        for name in sorted({shelves.key_name(role) for role in roles} & set(self.tree.refused)):
            raise BundleRejected(
                Reason.TRUST_FAILED,
                f"{self._location}: {self.tree.refused[name]}",
                f"find out who signed that; take it back with `revoke --team {shelves.team_of(name)}`",
            )
        self._changed |= roles

    def is_changed(self, role: str) -> bool:
        """Whether something that is signed with this role's keys was changed."""
        return any(shelves.key_name(changed) == role for changed in self._unsigned())

    def change_all(self, name: str) -> None:
        """Everything that is signed with the keys of one role is to be signed anew."""
        self.change({role for role in self.tree.roles if shelves.key_name(role) == name})

    def set_root_authority(self, role: str, authority: Authority, note: bridge.Note | None = None) -> None:
        """Other keys for one of TUF's four roles; the root has to be signed after it.

        With a `note` they are those of a rotation that is under way.
        """
        signing.set_authority(self._root, role, authority)
        bridge.write(self._root, role, note)

    def unfinished(self, role: str) -> bridge.Note | None:
        """The rotation of one of TUF's four roles that somebody began and did not finish."""
        return bridge.read(self._root, role)

    # signatures

    def sign_root(self, signers: Sequence[Signer], now: datetime, periods: Periods | None = None) -> File:
        """The next root, good for those who trust the one before and by itself."""
        periods = periods or self.periods
        self._root.unrecognized_fields[signing.PERIODS] = msgspec.to_builtins(periods)
        self._root.version += 1
        file = signing.sign(self._root, "root", signers, now, periods, self._trusted_root, self._root)
        self._trusted_root = deepcopy(self._root)
        return file

    def sign_targets(self, signers: Signers, now: datetime) -> Iterator[File]:
        """Each role that was changed; the snapshot signed after them names them."""
        depths = {role: role.count(".") - (role == shelves.TOP) for role in self._unsigned()}
        for role in sorted(depths, key=lambda r: (-depths[r], r)):
            payload = self.tree.roles[role]
            payload.version += 1
            parent = self.tree.parents.get(role)
            judge = self.tree.roles[parent] if parent else self._root
            file = signing.sign(payload, role, signers[shelves.key_name(role)], now, self.periods, judge)
            # Without digests of hundreds of bins, whose versions are enough: each is signed itself.
            self._snapshot.meta[f"{role}.json"] = (
                MetaFile(payload.version) if depths[role] > 0 else signing.meta_of(file, payload.version)
            )
            yield file
        self._changed.clear()

    def sign_snapshot(self, signers: Sequence[Signer], now: datetime) -> File:
        """The next snapshot; the timestamp signed after it names it."""
        file = self._next(self._snapshot, signers, now)
        self._timestamp.snapshot_meta = signing.meta_of(file, self._snapshot.version)
        return file

    def sign_timestamp(self, signers: Sequence[Signer], now: datetime) -> File:
        """The next timestamp; a reader sees the new state once it is written."""
        return self._next(self._timestamp, signers, now)

    def _unsigned(self) -> set[str]:
        """Bins that were replaced by more before they were signed are gone."""
        return self._changed & set(self.tree.roles)

    def _note_revoked(self, shelf: str, name: str, release: int) -> None:
        self.tree.roles[shelf].unrecognized_fields.setdefault(tree.REVOKED, {})[name] = release

    def _next(self, payload: Payload, signers: Sequence[Signer], now: datetime) -> File:
        payload.version += 1
        return signing.sign(payload, payload.type, signers, now, self.periods, self._root)

    def version_of(self, role: str) -> int:
        """The last version of a role that a snapshot has named; 0 when there was none."""
        meta = self._snapshot.meta.get(f"{role}.json")
        return meta.version if meta else 0

    def _bytes(self, name: str) -> bytes:
        data = self._get(name)
        if data is None:
            raise RepositoryError(f"metadata/{name} is missing")
        return data

    def _follow_root(self) -> None:
        while (data := self._get(f"{self._root.version + 1}.root.json")) is not None:
            newer = Metadata[Root].from_bytes(data)
            for judge in (self._root, newer.signed):
                judge.verify_delegate("root", newer.signed_bytes, newer.signatures)
            if newer.signed.version != self._root.version + 1:
                raise RepositoryError(f"root {newer.signed.version} lies where the next one belongs")
            self._root = newer.signed

    def _verified(self, kind: type[Payload], name: str, meta: MetaFile | None) -> Payload:
        data = self._bytes(name)
        if meta is not None:
            meta.verify_length_and_hashes(data)
        document = Metadata[Payload].from_bytes(data)
        self._root.verify_delegate(kind.type, document.signed_bytes, document.signatures)
        if not isinstance(document.signed, kind):
            raise RepositoryError(f"metadata/{name} is no {kind.type} metadata")
        if meta is not None and document.signed.version != meta.version:
            raise RepositoryError(f"metadata/{name} has version {document.signed.version}")
        return document.signed
