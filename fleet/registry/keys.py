"""The operator's keys: where private keys are found. Which key may sign what, signed metadata says, not this.

A role's keys are files of its name: `root.pem`, `root.2.pem`, … (Ed25519, PKCS#8 PEM, encrypted with a
password) or `root.uri`, which names a key in a security module or a cloud. An operator's is `operator.pem`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from securesystemslib.signer import Key, Signer  # type: ignore[attr-defined]

from edge_contract import canonical, dsse, wire
from edge_contract.errors import InputRejected, Reason
from fleet.registry import files, signers
from fleet.registry.password import pin
from fleet.registry.signers import Authority

# The four roles of TUF, and the key that signs desired states and commands.
ROLES = ("root", "targets", "snapshot", "timestamp", "operator")
PINNED_ROOT = "root.json"

_ENCRYPTED = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"


class Found(NamedTuple):
    """A key that a folder holds: its file, its public half, and how to sign with it."""

    path: Path
    public: Key
    signer: Callable[[], Signer]


class Keys:
    """Folders of keys. A key is read when it is needed, so the rest can be kept elsewhere."""

    def __init__(
        self,
        folder: Path | Sequence[Path],
        password: Callable[[], bytes],
        secret: signers.Secret = pin,
    ) -> None:
        """`password` is asked only if a needed file is encrypted, `secret` for the PIN of a module.

        New keys are put into the first folder.
        """
        self.folders = [folder] if isinstance(folder, Path) else list(folder)
        self.folder = self.folders[0]
        self._password = password
        self.secret = secret

    def load(self, role: str) -> Ed25519PrivateKey:
        """The first private key of a role that is in a file.

        Raises InputRejected: missing, wrong password, not such a key.
        """
        return self._open(self._path(role))

    def opened(self, role: str) -> Iterator[tuple[Path, Ed25519PrivateKey]]:
        """All private keys of a role that are in files. Raises InputRejected, also when there is none."""
        for path in [p for p in self.files(role) if p.suffix == ".pem"] or [self._path(role)]:
            yield path, self._open(path)

    def operators(self, named: Sequence[Path] = ()) -> list[Ed25519PrivateKey]:
        """Keys that sign messages: those of the files named, else all of the role. Raises InputRejected."""
        if named:
            return [self._open(path) for path in named]
        return [key for _, key in self.opened("operator")]

    def files(self, role: str) -> list[Path]:
        """The files of a role's keys, the first one first."""
        pattern = re.compile(rf"{re.escape(role)}(?:\.(\d+))?\.(?:pem|uri)")
        found = []
        for folder in self.folders:
            names = sorted(folder.iterdir()) if folder.is_dir() else []
            matches = [(pattern.fullmatch(path.name), path) for path in names]
            found += sorted((int(match[1] or 1), path) for match, path in matches if match)
        return [path for _, path in found]

    def found(self, role: str) -> Iterator[Found]:
        """The keys of a role's files, read one after the other. Raises InputRejected for a bad one."""
        for path in self.files(role):
            if path.suffix == ".uri":
                remote = signers.read_remote(path)
                yield Found(path, remote.key(), lambda r=remote: signers.of_remote(r, self.secret))  # type: ignore[misc]
            else:
                private = self._open(path)
                yield Found(path, signers.public_of(private), lambda p=private: signers.of_private(p))  # type: ignore[misc]

    def available(self, role: str, authority: Authority, last: Collection[str] = ()) -> list[Signer]:
        """As many signers as the role needs or as are here, from those that it names.

        Keys with ids in `last`, because they are being replaced, only where others do not suffice.
        """
        chosen: dict[str, Signer] = {}
        found = self.found(role)
        for key in sorted(found, key=lambda k: k.public.keyid in last) if last else found:
            if len(chosen) == authority.threshold:
                break
            if key.public.keyid in authority.keys and key.public.keyid not in chosen:
                chosen[key.public.keyid] = key.signer()
        return list(chosen.values())

    def signers(self, role: str, authority: Authority, last: Collection[str] = ()) -> list[Signer]:
        """Enough signers for a role. Raises InputRejected: they are missing, or not those that it names."""
        chosen = self.available(role, authority, last)
        if len(chosen) >= authority.threshold:
            return chosen
        if not self.files(role):
            self._read(self._path(role), f"the {role} key", _OFFLINE)
        have = f"{len(chosen)} of the {authority.threshold} {role} keys that are needed"
        if not chosen and authority.threshold == 1:
            have = f"this {role} key is not the one that the registry's signed metadata names"
        else:
            have = f"{have} {'is' if len(chosen) == 1 else 'are'} here"
        raise InputRejected(
            Reason.TRUST_FAILED,
            f"{', '.join(map(str, self.folders))}: {have}",
            "name the folders with this registry's keys with --keys, once for each",
        )

    def pinned_root(self) -> bytes:
        """The root of trust kept beside the keys, so that a broken-into registry cannot bring its own."""
        return self._read(
            self._root_folder() / PINNED_ROOT,
            "the pinned root",
            "name the folder of keys with --keys, or put the root.json of the day of `registry init` there",
        )

    def root_folders(self) -> list[Path]:
        """Where the pinned root lies: the folder that is used, and those with the very same one."""
        pinned, first = self.pinned_root(), self._root_folder()
        others = [f for f in self.folders if f != first and (f / PINNED_ROOT).is_file()]
        return [first, *(f for f in others if (f / PINNED_ROOT).read_bytes() == pinned)]

    def free_path(self, role: str, suffix: str) -> Path:
        """A name for one more key of a role that no file has, in the first folder."""
        number = 1
        while any((self.folder / f"{_stem(role, number)}{end}").exists() for end in (".pem", ".uri")):
            number += 1
        return self.folder / f"{_stem(role, number)}{suffix}"

    def _root_folder(self) -> Path:
        return next((f for f in self.folders if (f / PINNED_ROOT).is_file()), self.folder)

    def _path(self, role: str) -> Path:
        found = (path for path in self.files(role) if path.suffix == ".pem")
        return next(found, self.folder / f"{role}.pem")

    def _open(self, path: Path) -> Ed25519PrivateKey:
        return open_private(path, self._password)

    @staticmethod
    def _read(path: Path, what: str, next_step: str) -> bytes:
        try:
            return path.read_bytes()
        except OSError as e:
            raise InputRejected(
                Reason.BAD_INPUT, f"{path}: {what} cannot be read ({e.strerror})", next_step
            ) from e


_OFFLINE = "name its folder with --keys; a key kept offline is needed for this step"


def open_private(path: Path, password: Callable[[], bytes]) -> Ed25519PrivateKey:
    """A private key's file. Raises InputRejected: missing, wrong password, not such a key."""
    data = Keys._read(path, f"the {path.name.split('.')[0]} key", _OFFLINE)
    secret = password() if data.lstrip().startswith(_ENCRYPTED) else None
    try:
        key = load_pem_private_key(data, secret)
    except (ValueError, TypeError) as e:
        wrong = "wrong password" if secret is not None else "not a PEM private key"
        raise InputRejected(
            Reason.BAD_INPUT,
            f"{path}: {wrong}",
            "give the password that was chosen when the key was made, or restore the file",
        ) from e
    if not isinstance(key, Ed25519PrivateKey):
        raise InputRejected(
            Reason.BAD_INPUT, f"{path}: not an Ed25519 key", "restore the file that init made"
        )
    return key


def signing_keys(operators: wire.Operators, keys: Sequence[Ed25519PrivateKey]) -> list[Ed25519PrivateKey]:
    """As many of the keys as it takes to convince a device. Raises InputRejected when they do not suffice."""
    trusted = operators.trusted()
    by_id = {dsse.key_id(key.public_key().public_bytes_raw()): key for key in keys}
    chosen = [key for keyid, key in by_id.items() if keyid in trusted][: operators.threshold]
    if not chosen:
        raise InputRejected(
            Reason.UNSIGNED,
            "no operator key here is among those that the registry names",
            "name the folder with this registry's keys with --keys",
        )
    if len(chosen) < operators.threshold:
        raise InputRejected(
            Reason.UNSIGNED,
            f"{operators.threshold} operators have to sign, and the keys of {len(chosen)} are here",
            "name the others with --operator-key FILE, or folders with --keys, once for each",
        )
    return chosen


def generate(counts: Mapping[str, int]) -> dict[str, list[Ed25519PrivateKey]]:
    """New keys: role → so many of them."""
    return {role: [Ed25519PrivateKey.generate() for _ in range(n)] for role, n in counts.items()}


def save(folder: Path, keys: Mapping[str, Sequence[Ed25519PrivateKey]], password: bytes) -> None:
    """Write new keys, readable by their owner only; an empty password leaves them unencrypted."""
    for role, made in keys.items():
        for number, key in enumerate(made, 1):
            save_private(folder / f"{_stem(role, number)}.pem", key, password)


def save_private(path: Path, key: Ed25519PrivateKey, password: bytes) -> None:
    """Write one new private key. Raises InputRejected when the name is taken."""
    if path.exists():
        raise InputRejected(
            Reason.BAD_INPUT, f"{path}: there is a key here already", "move it away, or name another"
        )
    protection: KeySerializationEncryption = BestAvailableEncryption(password) if password else NoEncryption()
    files.write(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection), mode=0o600)


def new_pair(folder: Path, name: str, password: bytes) -> tuple[Path, Path]:
    """Make a key: its private file and its public one. Raises InputRejected when the name is taken."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise InputRejected(
            Reason.BAD_INPUT, f"{name!r} is no name for a key", "take letters, digits, `-` and `_`"
        )
    made = Ed25519PrivateKey.generate()
    if not folder.is_dir():
        folder.mkdir(mode=0o700, parents=True)
    save_private(private, made, password)
    save_public(public, made)
    return private, public


def save_remote(path: Path, remote: signers.Remote) -> None:
    """Write the description of a key that lies elsewhere."""
    files.write(path, canonical.to_bytes(remote), mode=0o600)


def save_public(path: Path, key: Ed25519PrivateKey) -> None:
    """Write the public half, to be given to whoever names the key in metadata."""
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    files.write(path, pem)


def retire(found: Iterable[tuple[Path, str]]) -> tuple[list[Path], list[str]]:
    """Set keys' files aside under names that no command looks for; nothing is deleted.

    Returns the new names, and a warning for each file that could not be set aside: the key in it is worth
    nothing any more all the same.
    """
    retired, warnings = [], []
    for path, keyid in found:
        aside = path.with_name(f"{path.name}.retired-{keyid[:8]}")
        try:
            files.rename(path, aside)
            retired.append(aside)
        except OSError as e:
            warnings.append(
                f"{path}: the old key could not be set aside ({e.strerror}): move it away yourself"
            )
    return retired, warnings


def exposed(written: Iterable[Path]) -> list[str]:
    """A warning for each private key's file that others may read: some file systems keep no modes."""
    return [
        f"{path}: others can read this private key, and the file system does not let that be changed"
        for path in written
        if path.stat().st_mode & 0o077
    ]


def _stem(role: str, number: int) -> str:
    return role if number == 1 else f"{role}.{number}"
