"""What a version offers beside its whole blobs: compressed ones, and patches from versions that devices run.

The offers are a signed document of their own (edge_contract.encodings), because the manifest is fixed when
a version is published, while it turns out later what devices run. How blobs are encoded is encode/'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from edge_contract import canonical, encodings
from edge_contract.encodings import EncodedBlob, Encoding, Encodings
from edge_contract.errors import InputRejected, Reason
from edge_contract.manifest import File, Manifest
from fleet.registry import files
from fleet.registry.encode import candidates
from fleet.registry.encode.candidates import Candidate
from fleet.registry.reader import Published
from fleet.registry.repository import Repository
from fleet.registry.trust import Target

# Versions before that `auto` makes patches from.
RECENT = 3
# Shorter blobs are not worth a decoder's start.
_LEAST_BYTES = 8 << 10
_MOST_OFFERS = 64


class Made(NamedTuple):
    """One offer that was added, for whoever watches."""

    file: str
    algorithm: str
    base: str | None
    size_bytes: int
    blob_bytes: int

    def __str__(self) -> str:
        way = f"{self.algorithm} from {self.base}" if self.base else self.algorithm
        return f"{self.file}: {way}, {self.size_bytes / self.blob_bytes:.1%} of {self.blob_bytes} bytes"


def bases(published: Sequence[Published], words: Sequence[str], manifest: Manifest) -> list[Manifest] | None:
    """What `--delta-from` says: manifests to make patches from, None for no encodings at all.

    `auto` are the versions released last before this one, which devices most likely run.
    """
    if "none" in words:
        return None
    older = [p.manifest for p in published if p.manifest.release < manifest.release]
    newest = sorted(older, key=lambda m: -m.release)[:RECENT] if "auto" in words else []
    named = chosen(published, [word for word in words if word != "auto"], manifest)
    return newest + [base for base in named if base not in newest]


def chosen(published: Sequence[Published], versions: Sequence[str], manifest: Manifest) -> list[Manifest]:
    """The manifests of named versions. Raises InputRejected."""
    known = {p.manifest.version: p.manifest for p in published if p.manifest.version != manifest.version}
    for version in versions:
        if version not in known:
            raise InputRejected(
                Reason.NOT_PUBLISHED,
                f"{manifest.name}@{version} is not published, so there is nothing to make a patch from",
                f"name other versions of {manifest.name}: {', '.join(known) or 'there are none'}",
            )
    return [known[version] for version in dict.fromkeys(versions)]


def offer(repo: Repository, version: Published, bases: Sequence[Manifest]) -> Iterator[Made]:
    """Encode the blobs of a version, write what is useful, and add the document to the draft.

    What was offered before stays. Yields each new offer; the draft has to be signed after the last.
    """
    manifest = version.manifest
    target = encodings.target_name(manifest.name, manifest.version)
    known = _known(repo, target)
    blobs = []
    for file in _distinct(manifest):
        old = known.get(file.sha256, [])
        new: dict[tuple[str, str | None], Encoding] = {(e.algorithm, e.base_sha256): e for e in old}
        for made, encoding in _encoded(repo, file, bases, old):
            new[encoding.algorithm, encoding.base_sha256] = encoding
            yield made
        if new:
            kept = list(new.values())[-_MOST_OFFERS:]
            blobs.append(EncodedBlob(file.sha256, file.size_bytes, kept))
    if not blobs:
        return
    document = Encodings(1, manifest.name, manifest.version, version.sha256, blobs)
    data = encodings.to_bytes(document)
    encodings.from_bytes(data)
    digest = canonical.sha256_hex(data)
    files.write(repo.path(digest), data)
    repo.draft.add(target, Target(len(data), digest))


def _encoded(
    repo: Repository, file: File, bases: Sequence[Manifest], known: Sequence[Encoding]
) -> Iterator[tuple[Made, Encoding]]:
    """New offers for one blob, their bytes written."""
    if not _LEAST_BYTES <= file.size_bytes <= candidates.MOST_BYTES:
        return
    blob = _blob(repo, file)
    full_bytes = min([file.size_bytes, *(e.size_bytes for e in known if e.base_sha256 is None)])
    if full_bytes == file.size_bytes:
        whole = candidates.whole(blob)
        if candidates.worthwhile_whole(whole, len(blob)):
            full_bytes = whole.size_bytes
            yield _written(repo, file, whole, None, None)
    done = {e.base_sha256 for e in known}
    for base in bases:
        old = _counterpart(file, base)
        if old is None or old.sha256 in {file.sha256, *done} or old.size_bytes > candidates.MOST_BYTES:
            continue
        done.add(old.sha256)
        found = list(candidates.patches(_blob(repo, old), blob))
        for patch in candidates.worthwhile_patches(found, full_bytes):
            yield _written(repo, file, patch, old.sha256, base.version)


def _written(
    repo: Repository, file: File, made: Candidate, base_sha256: str | None, base_version: str | None
) -> tuple[Made, Encoding]:
    digest = canonical.sha256_hex(made.data)
    files.write(repo.path(digest), made.data)
    encoding = Encoding(made.algorithm, digest, made.size_bytes, made.memory_bytes, base_sha256)
    return Made(file.name, made.algorithm, base_version, made.size_bytes, file.size_bytes), encoding


def _counterpart(file: File, base: Manifest) -> File | None:
    """The file of another version that has most in common: of the same name, or alone in its role."""
    for other in base.files:
        if (other.role, other.name) == (file.role, file.name):
            return other
    same_role = [other for other in base.files if other.role == file.role]
    return same_role[0] if len(same_role) == 1 else None


def _distinct(manifest: Manifest) -> list[File]:
    return list({file.sha256: file for file in manifest.files}.values())


def _known(repo: Repository, target: str) -> Mapping[str, list[Encoding]]:
    """What is on offer already, by blob."""
    signed = repo.draft.targets.get(target)
    if signed is None:
        return {}
    document = encodings.from_bytes(repo.blob(signed, "the list of encodings"))
    return {blob.sha256: blob.encodings for blob in document.blobs}


def _blob(repo: Repository, file: File) -> bytes:
    return repo.blob(Target(file.size_bytes, file.sha256), f"the content of {file.name}")
