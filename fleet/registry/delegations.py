"""Changing the tree of delegations in memory: where a version is put, teams, hash bins.

Each method changes the tree and returns the roles that have to be signed anew. shelves.py says which role
names what; draft.py signs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

# Both packages document these names here without listing them in __all__.
from securesystemslib.signer import Key  # type: ignore[attr-defined]
from tuf.api.metadata import (  # type: ignore[attr-defined]
    DelegatedRole,
    Delegations,
    Role,
    SuccinctRoles,
    TargetFile,
)

from fleet.registry import shelves
from fleet.registry.signers import Authority
from fleet.registry.tree import Tree, bin_for, bins_of, bits_of, blank


class Editor:
    """Changes one tree."""

    def __init__(self, tree: Tree, version_of: Callable[[str], int], own: Callable[[], Authority]) -> None:
        """`version_of` gives the last version of a role that a snapshot named, from which it goes on.

        `own` gives the keys of the role `targets`, which the registry's own versions are signed with.
        """
        self._tree = tree
        self._version_of = version_of
        self._own = own

    def put(self, name: str, target: TargetFile) -> set[str]:
        """Name a target in the role that clients ask for it."""
        shelf = self._tree.shelf_of(name)
        if shelf is not None:
            return self._put_in(shelf, name, target)
        top = self._tree.top
        top.targets[name] = target
        if sum(map(shelves.is_shelved, top.targets)) <= shelves.FULL:
            return {shelves.TOP}
        found = self._tree.every()
        self._add_role(DelegatedRole(shelves.MODELS, [], 1, True, list(shelves.MODELS_PATHS)), self._own())
        return {shelves.TOP} | self._move(found)

    def take(self, name: str) -> str:
        """Remove a target from the role that names it; returns that role. Raises KeyError."""
        wanted = self._tree.find(name)
        for role, targets in self._tree.roles.items():
            if wanted is not None and targets.targets.get(name) is wanted:
                del targets.targets[name]
                return role
        raise KeyError(name)

    def delegate(self, role: str, pattern: str, authority: Authority) -> set[str]:
        """Give the models that match a pattern to a role, and what is published of them with it."""
        found = self._tree.every()
        known = self._roles().get(role)
        path = shelves.paths_of(pattern)
        if known is None:
            self._add_role(DelegatedRole(role, [], 1, True, [path]), authority)
        elif known.paths is not None and path not in known.paths:
            known.paths.append(path)
        return {shelves.TOP} | self._move(found)

    def dissolve(self, role: str) -> dict[str, TargetFile]:
        """Take a delegation back; returns what the role had published, which nobody names any more."""
        mine = {n: t for n, t in self._tree.every().items() if self._tree.shelf_of(n) == role}
        delegations = self._tree.top.delegations
        if delegations is None or delegations.roles is None:
            raise RuntimeError("no delegations")
        del delegations.roles[role]
        self._forget([*bins_of(self._tree.roles[role]), role])
        self._tree.refused.pop(role, None)
        _prune(delegations)
        if not delegations.roles:
            self._tree.top.delegations = None
        return mine

    def set_authority(self, name: str, authority: Authority) -> None:
        """Other keys for a team, or for the registry's own versions below `targets`."""
        shelf = shelves.MODELS if name == shelves.TOP else name
        delegations = self._tree.top.delegations
        role = self._roles().get(shelf)
        if delegations is None or role is None:
            return
        _assign(delegations, role, authority)
        inner = self._tree.roles[shelf].delegations
        if inner is not None and inner.succinct_roles is not None:
            _assign(inner, inner.succinct_roles, authority)

    def patterns(self, role: str) -> list[str]:
        """The models that a role answers for."""
        known = self._roles().get(role)
        return [shelves.pattern_of(path) for path in (known.paths or [])] if known else []

    def _put_in(self, shelf: str, name: str, target: TargetFile) -> set[str]:
        role = self._tree.role(shelf, shelves.TOP)
        held = self._held(shelf)
        held[name] = target
        bits = shelves.bits_for(len(held), bits_of(role))
        if bits != bits_of(role):
            return self._spread(shelf, held, bits)
        holder = bin_for(role, name) if bits else shelf
        self._tree.roles[holder].targets[name] = target
        return {holder}

    def _held(self, shelf: str) -> dict[str, TargetFile]:
        role = self._tree.role(shelf, shelves.TOP)
        roles = [role, *(self._tree.role(name, shelf) for name in bins_of(role))]
        return {name: target for held in roles for name, target in held.targets.items()}

    def _spread(self, shelf: str, held: Mapping[str, TargetFile], bits: int) -> set[str]:
        """More bins, and every version into the one where a client looks for it."""
        role = self._tree.roles[shelf]
        authority = self._authority(shelf)
        self._forget(bins_of(role))
        succinct = SuccinctRoles([], 1, bits, shelves.bin_prefix(shelf, bits))
        role.delegations = Delegations({}, succinct_roles=succinct)
        _assign(role.delegations, succinct, authority)
        role.targets.clear()
        names = bins_of(role)
        for name in names:
            self._tree.roles[name] = blank(self._version_of(name))
            self._tree.parents[name] = shelf
        for name, target in held.items():
            self._tree.roles[bin_for(role, name)].targets[name] = target
        return {shelf, *names}

    def _add_role(self, role: DelegatedRole, authority: Authority) -> None:
        """The registry's own role stays the last: the first that matches answers."""
        top = self._tree.top
        if top.delegations is None:
            top.delegations = Delegations({}, roles={})
        own = {name: r for name, r in self._roles().items() if name == shelves.MODELS}
        others = {name: r for name, r in self._roles().items() if name != shelves.MODELS}
        top.delegations.roles = {**others, role.name: role, **own}
        _assign(top.delegations, role, authority)
        self._tree.roles[role.name] = blank(self._version_of(role.name))
        self._tree.parents[role.name] = shelves.TOP

    def _move(self, found: Mapping[str, TargetFile]) -> set[str]:
        """Versions that lie where a client would not look for them any more are moved to where it does.

        `found` are those that a client would have found before. What else lies about was put there by a
        team that has no right to it: with another signature it must not become what clients do find.
        """
        changed: set[str] = set()
        for holder, role in list(self._tree.roles.items()):
            shelf = holder.partition(".")[0]
            for name in [n for n, t in role.targets.items() if shelves.is_shelved(n) and found.get(n) is t]:
                owner = self._tree.shelf_of(name) or shelves.TOP
                if owner != shelf:
                    changed |= {holder, *self._put_in(owner, name, role.targets.pop(name))}
        return changed & set(self._tree.roles)

    def _forget(self, names: Sequence[str]) -> None:
        for name in names:
            self._tree.roles.pop(name, None)
            self._tree.parents.pop(name, None)

    def _roles(self) -> dict[str, DelegatedRole]:
        delegations = self._tree.top.delegations
        return dict(delegations.roles or {}) if delegations else {}

    def _authority(self, shelf: str) -> Authority:
        role = self._roles()[shelf]
        return Authority({keyid: self._tree.top.get_key(keyid) for keyid in role.keyids}, role.threshold)


def _assign(delegations: Delegations, role: Role, authority: Authority) -> None:
    role.keyids = list(authority.keys)
    role.threshold = authority.threshold
    known: dict[str, Key] = delegations.keys
    known.update(authority.keys)
    _prune(delegations)


def _prune(delegations: Delegations) -> None:
    """Drop the keys that no role uses."""
    roles: list[Role] = list((delegations.roles or {}).values())
    if delegations.succinct_roles is not None:
        roles.append(delegations.succinct_roles)
    used = {keyid for role in roles for keyid in role.keyids}
    delegations.keys = {keyid: key for keyid, key in delegations.keys.items() if keyid in used}
