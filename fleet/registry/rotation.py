"""Other keys for a role: new ones, fewer, more, another threshold. A reader at any moment can follow.

TUF's four roles are named by the root. It is signed twice: first with old and new keys both good, and only
after everything was signed with the new ones without the old. A root key itself needs one step, since the
new root is signed by the old keys and the new. Teams and operators are named in targets: one step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import Key, Signer  # type: ignore[attr-defined]

from edge_contract.errors import InputRejected, Reason
from fleet.registry import keys, repository, shelves, signers, signing
from fleet.registry.keys import Keys
from fleet.registry.repository import Repository
from fleet.registry.signers import Authority, Remote

OPERATOR = "operator"


class Change(NamedTuple):
    """What to do with a role's keys.

    `drop` are ids or their beginnings, None stands for all. So many keys are made new as `generate` says,
    None stands for as many as were dropped and are not given as `publics` or `remotes`.
    """

    role: str
    drop: Sequence[str] | None = ()
    generate: int | None = 0
    publics: Sequence[Key] = ()
    remotes: Sequence[Remote] = ()
    threshold: int | None = None
    label: str = ""


class Changed(NamedTuple):
    """Ids of the keys that came and went, the files that were written, and those that were set aside."""

    added: list[str]
    dropped: list[str]
    written: list[Path]
    retired: list[Path]
    threshold: int


class Made(NamedTuple):
    """New keys, not yet written: private ones by id, and keys that lie elsewhere."""

    private: dict[str, Ed25519PrivateKey]
    remotes: Sequence[Remote]

    def signer(self, keyring: Keys, keyid: str) -> Signer | None:
        """A signer for one of them."""
        if keyid in self.private:
            return signers.of_private(self.private[keyid])
        remote = next((r for r in self.remotes if r.keyid == keyid), None)
        return None if remote is None else signers.of_remote(remote, keyring.secret)

    def save(self, keyring: Keys, role: str, password: bytes) -> list[Path]:
        """Write them into the first folder, under names that no file has."""
        written = []
        for key in self.private.values():
            written.append(keyring.free_path(role, ".pem"))
            keys.save_private(written[-1], key, password)
        for remote in self.remotes:
            written.append(keyring.free_path(role, ".uri"))
            keys.save_remote(written[-1], remote)
        return written


def change(repo: Repository, keyring: Keys, wanted: Change, new_password: Callable[[], bytes]) -> Changed:
    """Give a role of TUF's, or a team's, other keys. `new_password` protects those that are made.

    Raises InputRejected; then nothing has changed.
    """
    old = repo.draft.authority(wanted.role)
    dropped = resolve(wanted, list(old.keys))
    made, final = _final(wanted, old, dropped)
    found = keyring.found(wanted.role) if dropped else ()
    retiring = [(key.path, key.public.keyid) for key in found if key.public.keyid in dropped]
    ready = _prepare(repo, keyring, wanted.role, old, final, made)
    password = new_password() if made.private else b""
    written = made.save(keyring, wanted.role, password)
    _sign(repo, wanted.role, old, final, ready)
    retired = [keys.retire(path, keyid) for path, keyid in retiring]
    added = [keyid for keyid in final.keys if keyid not in old.keys]
    return Changed(added, dropped, written, retired, final.threshold)


def resolve(wanted: Change, known: Sequence[str]) -> list[str]:
    """The ids of the keys to drop. Raises InputRejected for one that is unknown or ambiguous."""
    if wanted.drop is None:
        return list(known)
    found = []
    for start in wanted.drop:
        matching = [keyid for keyid in known if keyid.startswith(start)]
        if len(matching) != 1:
            raise InputRejected(
                Reason.BAD_INPUT,
                f"{start!r} is the beginning of {len(matching)} keys of {wanted.role}, not of one",
                f"its keys are {', '.join(keyid[:12] for keyid in known)}",
            )
        found += matching
    return found


def check_threshold(role: str, threshold: int, count: int) -> None:
    """Raises InputRejected when it can never be reached."""
    if not 1 <= threshold <= count:
        raise InputRejected(
            Reason.BAD_INPUT,
            f"{role} would have {count} keys and a threshold of {threshold}",
            "add keys, or set the --threshold to at most their number",
        )


def how_many(wanted: Change, dropped: Sequence[str]) -> int:
    """How many keys are to be made."""
    given = len(wanted.publics) + len(wanted.remotes)
    return max(0, len(dropped) - given) if wanted.generate is None else wanted.generate


def _final(wanted: Change, old: Authority, dropped: Sequence[str]) -> tuple[Made, Authority]:
    private = [Ed25519PrivateKey.generate() for _ in range(how_many(wanted, dropped))]
    made = Made({signers.public_of(key).keyid: key for key in private}, wanted.remotes)
    new = [
        *(signers.public_of(key) for key in private),
        *(r.key() for r in wanted.remotes),
        *wanted.publics,
    ]
    kept = {keyid: key for keyid, key in old.keys.items() if keyid not in dropped}
    final = Authority({**kept, **{key.keyid: key for key in new}}, wanted.threshold or old.threshold)
    check_threshold(wanted.role, final.threshold, len(final.keys))
    return made, final


class _Ready(NamedTuple):
    """All signers that the change needs, read before the first write."""

    root: Sequence[Signer]
    others: dict[str, list[Signer]]


def _prepare(
    repo: Repository, keyring: Keys, role: str, old: Authority, final: Authority, made: Made
) -> _Ready:
    draft = repo.draft
    top = role in signing.TOP_ROLES
    root = keyring.signers("root", draft.authority("root")) if top else []
    new = _enough(keyring, role, final, made)
    if role == "root":
        return _Ready(_distinct([*root, *new]), {})
    others = repository.load(
        repo, keyring, {"snapshot", "timestamp", *(() if top else ("targets",))} - {role}
    )
    # A reader who fetched the root a moment ago still asks for the old key's signature.
    before = keyring.available(role, old) if top else []
    return _Ready(root, {**others, role: _distinct([*new, *before])})


def _sign(repo: Repository, role: str, old: Authority, final: Authority, ready: _Ready) -> None:
    draft = repo.draft
    if role == "root":
        draft.set_root_authority(role, final)
        repository.write_root(repo, ready.root)
        return
    draft.editor.set_authority(role, final)
    if role in signing.TOP_ROLES:
        bridge = Authority({**old.keys, **final.keys}, min(old.threshold, final.threshold))
        draft.set_root_authority(role, bridge)
        repository.write_root(repo, ready.root)
        if role == shelves.TOP:
            draft.change_all(role)
        list(repository.publish(repo, ready.others))
        draft.set_root_authority(role, final)
        repository.write_root(repo, ready.root)
    else:
        draft.change({shelves.TOP})
        draft.change_all(role)
        list(repository.publish(repo, ready.others))


def _enough(keyring: Keys, role: str, final: Authority, made: Made) -> list[Signer]:
    """Signers for the new keys. Raises InputRejected when too few of them are here."""
    chosen = [signer for keyid in final.keys if (signer := made.signer(keyring, keyid)) is not None]
    chosen = _distinct([*chosen[: final.threshold], *keyring.available(role, final)])[: final.threshold]
    if len(chosen) < final.threshold:
        raise InputRejected(
            Reason.TRUST_FAILED,
            f"{len(chosen)} of the {final.threshold} private keys that {role} will need are here",
            "name the folders that hold them with --keys, once for each",
        )
    return chosen


def _distinct(given: Sequence[Signer]) -> list[Signer]:
    return list({signer.public_key.keyid: signer for signer in given}.values())
