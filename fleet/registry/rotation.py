"""Other keys for a role: new ones, fewer, more, another threshold. A reader at any moment can follow.

TUF's four roles are named by the root. It is signed twice: first with old and new keys both good, and only
after everything was signed with the new ones without the old. The first one notes where to, so that after a
kill the next attempt finishes it. A root key itself needs one step, since the new root is signed by the old
keys and the new. Teams and operators are named in targets: one step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import Key, Signer  # type: ignore[attr-defined]

from edge_contract.errors import EdgewardError, InputRejected, Reason
from fleet.registry import keys, repository, shelves, signers, signing
from fleet.registry.bridge import Note
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
    """Ids of the keys that came and went, the files that were written, and those that were set aside.

    `finished`: it is the change that somebody began before and did not finish.
    """

    added: list[str]
    dropped: list[str]
    written: list[Path]
    retired: list[Path]
    threshold: int
    warnings: list[str]
    finished: bool = False


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
        # After a kill they may have been written already.
        here = [signers.read_remote(path).keyid for path in keyring.files(role) if path.suffix == ".uri"]
        for remote in (r for r in self.remotes if r.keyid not in here):
            written.append(keyring.free_path(role, ".uri"))
            keys.save_remote(written[-1], remote)
        return written


def change(repo: Repository, keyring: Keys, wanted: Change, new_password: Callable[[], bytes]) -> Changed:
    """Give a role of TUF's, or a team's, other keys. `new_password` protects those that are made.

    A rotation that was not finished is finished instead, if its keys are here. Raises InputRejected; then
    nothing has changed.
    """
    plan = _plan(repo, keyring, wanted)
    dropped = [keyid for keyid in plan.old.keys if keyid not in plan.final.keys]
    found = keyring.found(plan.role) if dropped else ()
    retiring = [(key.path, key.public.keyid) for key in found if key.public.keyid in dropped]
    ready = _prepare(repo, keyring, plan)
    password = new_password() if plan.made.private else b""
    documents = _signed(repo, plan, ready)
    written = plan.made.save(keyring, plan.role, password)
    # Before the last root of two, so that a kill between them leaves nothing to be done by hand.
    last = documents[-1:] if plan.steps else []
    for file in documents[: len(documents) - len(last)]:
        repo.write(file)
    retired, warnings = keys.retire(retiring)
    for file in last:
        repo.write(file)
    added = [keyid for keyid in plan.final.keys if keyid not in plan.old.keys]
    warnings = [*ready.warnings, *keys.exposed(written), *warnings]
    return Changed(added, dropped, written, retired, plan.final.threshold, warnings, plan.finishing)


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


class _Plan(NamedTuple):
    """From which keys to which. `steps`: by a bridge, which is there already when `finishing`."""

    role: str
    old: Authority
    final: Authority
    made: Made
    steps: bool
    finishing: bool


def _plan(repo: Repository, keyring: Keys, wanted: Change) -> _Plan:
    """What to do: finish what was begun, else what is wanted."""
    role = wanted.role
    steps = role in signing.TOP_ROLES and role != "root"
    begun = repo.draft.unfinished(role)
    if begun is not None and len(keyring.available(role, begun.final)) >= begun.final.threshold:
        return _Plan(role, begun.old, begun.final, Made({}, ()), steps, finishing=True)
    old = repo.draft.authority(role) if begun is None else begun.old
    made, final = _final(wanted, old, resolve(wanted, list(old.keys)))
    return _Plan(role, old, final, made, steps, finishing=False)


class _Ready(NamedTuple):
    """All signers that the change needs, read before the first write, and old ones that do not sign."""

    root: Sequence[Signer]
    others: dict[str, list[Signer]]
    warnings: list[str]


def _prepare(repo: Repository, keyring: Keys, plan: _Plan) -> _Ready:
    draft, role = repo.draft, plan.role
    dropped = [keyid for keyid in plan.old.keys if keyid not in plan.final.keys]
    top = role in signing.TOP_ROLES
    last = dropped if role == "root" else ()
    root = keyring.signers("root", draft.authority("root"), last) if top else []
    new = _enough(keyring, role, plan.final, plan.made)
    if role == "root":
        return _Ready(_distinct([*root, *new]), {}, [])
    needed = {"snapshot", "timestamp", *(() if top else ("targets",))} - {role}
    others = repository.load(repo, keyring, needed)
    before, warnings = _before(keyring, role, plan.old) if plan.steps else ([], [])
    return _Ready(root, {**others, role: _distinct([*new, *before])}, warnings)


def _before(keyring: Keys, role: str, old: Authority) -> tuple[list[Signer], list[str]]:
    """The old keys that are here and still sign, tried; what is wrong with the others.

    A reader who fetched the root a moment ago still asks for their signatures. They may be what is broken.
    """
    chosen: dict[str, Signer] = {}
    warnings = []
    for key in keyring.found(role):
        if key.public.keyid not in old.keys or len(chosen) >= old.threshold:
            continue
        try:
            chosen[key.public.keyid] = signers.tried(key.signer, role)
        except EdgewardError as e:
            warnings.append(f"{key.path}: the old key does not sign, so it is replaced without it: {e.what}")
    return list(chosen.values()), warnings


def _signed(repo: Repository, plan: _Plan, ready: _Ready) -> list[signing.File]:
    """Every document, in the order in which it is to be written. Nothing is written if a signer fails."""
    draft, role, now = repo.draft, plan.role, repo.now()
    if role == "root":
        draft.set_root_authority(role, plan.final)
        return [draft.sign_root(ready.root, now)]
    done = []
    draft.editor.set_authority(role, plan.final)
    if plan.steps and not plan.finishing:
        draft.set_root_authority(role, _bridge(draft.authority(role), plan), Note(plan.old, plan.final))
        done.append(draft.sign_root(ready.root, now))
    if role == shelves.TOP or not plan.steps:
        draft.change({shelves.TOP})
        draft.change_all(role)
    done += repository.signed(repo, ready.others)
    if plan.steps:
        draft.set_root_authority(role, plan.final)
        done.append(draft.sign_root(ready.root, now))
    return done


def _bridge(now: Authority, plan: _Plan) -> Authority:
    """Old and new keys, under the lowest threshold: what the old ones signed is still to be read.

    Those of a rotation that was begun and whose keys are lost are among them; they may have signed.
    """
    threshold = min(now.threshold, plan.old.threshold, plan.final.threshold)
    return Authority({**now.keys, **plan.old.keys, **plan.final.keys}, threshold)


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
