"""Walking a registry's delegations, each role verified by the one that names it. It fetches and judges only.

python-tuf's client follows delegations for one target; this also lists them all, by the same rules: a name
counts only where a client that looks for it would find it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime

from tuf.api.exceptions import ExpiredMetadataError, RepositoryError

# python-tuf documents these names here without listing them in __all__.
from tuf.api.metadata import Metadata, MetaFile, Snapshot, TargetFile, Targets  # type: ignore[attr-defined]

from fleet.registry import shelves

# A role's metadata by file name and longest length that is taken.
Get = Callable[[str, int], bytes]
# What python-tuf's client takes.
_LIMIT_BYTES = 5_000_000
# A role's field: target name → release of each version that was taken back.
REVOKED = "x-edgeward-revoked"


class NotItsOwn(RepositoryError):
    """A role's metadata is signed as it must be, and says what this role may not say."""


class Tree:
    """The roles below one verified snapshot. Each is fetched once, when it is first needed."""

    def __init__(self, targets: Targets, snapshot: Snapshot, get: Get, now: datetime | None) -> None:
        """`now` is what expiry is judged by; None judges none.

        Its methods raise python-tuf's RepositoryError and what `get` raises.
        """
        self._snapshot = snapshot
        self._get = get
        self._now = now
        self.roles: dict[str, Targets] = {shelves.TOP: targets}
        # Teams whose metadata has expired: their models are not to be had, the others are.
        self.expired: list[str] = []
        # Teams that have signed what they may not, and what: their models are left out, too.
        self.refused: dict[str, str] = {}
        # role → the one that names it
        self.parents: dict[str, str] = {}

    @property
    def top(self) -> Targets:
        """The metadata of the role `targets`."""
        return self.roles[shelves.TOP]

    def shelf_of(self, name: str) -> str | None:
        """The delegated role that answers for a target, or None when `targets` itself does."""
        delegations = self.top.delegations
        found = delegations.get_roles_for_target(name) if delegations else iter(())
        return next((role for role, _ in found), None)

    def find(self, name: str) -> TargetFile | None:
        """What signed metadata says of a target; None when it is not published."""
        return next((t for role in self._route(name) if (t := role.targets.get(name)) is not None), None)

    def every(self) -> Mapping[str, TargetFile]:
        """All targets that a client would find."""
        self.load()
        found = {}
        for role in list(self.roles.values()):
            for name, target in role.targets.items():
                if self.shelf_of(name) not in self.expired and self.find(name) is target:
                    found[name] = target
        return found

    def load(self) -> None:
        """Fetch and judge every role. A team's is noted and left out when it has expired or is refused."""
        for shelf in self.shelves():
            try:
                for name in bins_of(self.role(shelf, shelves.TOP)):
                    self.role(name, shelf)
            except ExpiredMetadataError:
                if shelves.team_of(shelf) is None:
                    raise
                self.expired.append(shelf)
            except NotItsOwn as e:
                if shelves.team_of(shelf) is None:
                    raise
                self._leave_out(shelf, str(e))

    def shelves(self) -> list[str]:
        """The roles that `targets` names. One that has signed nothing yet is among them."""
        delegations = self.top.delegations
        return list(delegations.roles or {}) if delegations else []

    def role(self, name: str, parent: str) -> Targets:
        """A role's metadata; empty, under version 0, when it has signed none yet."""
        if self.parents.get(name, parent) != parent:
            raise NotItsOwn(f"{parent} names {name}, which is another's")
        if name not in self.roles:
            meta = self._snapshot.meta.get(f"{name}.json")
            self.roles[name] = blank(0) if meta is None else self._fetched(name, parent, meta)
            self.parents[name] = parent
        return self.roles[name]

    def _route(self, name: str) -> Iterator[Targets]:
        yield self.top
        shelf = self.shelf_of(name)
        if shelf is None:
            return
        role = self.role(shelf, shelves.TOP)
        yield role
        if bins_of(role):
            yield self.role(bin_for(role, name), shelf)

    def _leave_out(self, shelf: str, why: str) -> None:
        self.refused[shelf] = why
        for name in [name for name, parent in self.parents.items() if parent == shelf]:
            del self.roles[name], self.parents[name]
        meta = self._snapshot.meta.get(f"{shelf}.json")
        self.roles[shelf] = blank(meta.version if meta else 0)
        self.parents[shelf] = shelves.TOP

    def _fetched(self, name: str, parent: str, meta: MetaFile) -> Targets:
        data = self._get(f"{meta.version}.{name}.json", meta.length or _LIMIT_BYTES)
        meta.verify_length_and_hashes(data)
        document = Metadata[Targets].from_bytes(data)
        self.roles[parent].verify_delegate(name, document.signed_bytes, document.signatures)
        signed = document.signed
        if not isinstance(signed, Targets):
            raise RepositoryError(f"metadata of {name} is no targets metadata")
        if signed.version != meta.version:
            raise RepositoryError(f"metadata of {name} has version {signed.version}, not {meta.version}")
        _judge(name, parent, signed)
        if self._now is not None and signed.is_expired(self._now):
            raise ExpiredMetadataError(f"{name} has expired on {signed.expires:%Y-%m-%d %H:%M} UTC")
        return signed


def blank(version: int) -> Targets:
    """A role that names nothing and is to be signed under the version after this one; 0 if it is new."""
    role = Targets()
    role.version = version
    return role


def _judge(name: str, parent: str, role: Targets) -> None:
    """What python-tuf would follow and nobody here signs: clients and this would see different registries."""
    if role.delegations is not None:
        bins = role.delegations.succinct_roles
        if parent != shelves.TOP or bins is None or role.delegations.roles:
            raise NotItsOwn(f"{name} delegates to others than bins")
        own = shelves.bin_prefix(name, bins.bit_length)
        if bins.bit_length > shelves.MAX_BITS or bins.name_prefix != own:
            raise NotItsOwn(f"{name} has the bins {bins.name_prefix}-…, which are not its own")
    if any("sha256" not in target.hashes for target in role.targets.values()):
        raise NotItsOwn(f"{name} names a file without its SHA-256")
    noted = role.unrecognized_fields.get(REVOKED, {})
    if not isinstance(noted, dict) or any(type(release) is not int for release in noted.values()):
        raise NotItsOwn(f"{name} has no releases by name in {REVOKED}")


def revoked_of(role: Targets) -> Mapping[str, int]:
    """What a role says of versions that were taken back: target name → release."""
    noted: Mapping[str, int] = role.unrecognized_fields.get(REVOKED, {})
    return noted


def bins_of(role: Targets) -> list[str]:
    """The names of a role's bins."""
    succinct = role.delegations.succinct_roles if role.delegations else None
    return list(succinct.get_roles()) if succinct else []


def bits_of(role: Targets) -> int:
    """Bits of the numbers of a role's bins; 0 without bins."""
    succinct = role.delegations.succinct_roles if role.delegations else None
    return succinct.bit_length if succinct else 0


def bin_for(role: Targets, name: str) -> str:
    """The bin for a target in a role that has bins."""
    if role.delegations is None or role.delegations.succinct_roles is None:
        raise RuntimeError("a role without bins")
    return role.delegations.succinct_roles.get_role_for_target(name)
