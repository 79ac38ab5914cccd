"""What is recorded of this device's own forms of models, and whether their bytes are still those.

No runtime and no numpy: the control process looks, too. serving/prepared.py makes the forms and finds them.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from edge_agent import files, verified
from edge_agent.layout import Layout
from edge_contract import canonical
from edge_contract.errors import BundleRejected, Reason
from edge_contract.manifest import Count, Digest

RECORD = "prepared.json"
_KEY_DIGITS = 16


class Key(Struct, frozen=True, forbid_unknown_fields=True):
    """What a form depends on beside the model. Another value of any of these needs another form."""

    runtime: str
    cpu: str
    isa: list[str]
    threads: int
    spinning: bool

    @property
    def name(self) -> str:
        """The folder's name."""
        return canonical.sha256_hex(canonical.to_bytes(self))[:_KEY_DIGITS]


class Part(Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a form. While its inode and time of change are those recorded, it is not hashed again."""

    name: str
    size_bytes: Count
    sha256: Digest
    inode: Count
    mtime_ns: int


class Record(Struct, frozen=True, forbid_unknown_fields=True):
    """What lies in a form's folder, written last."""

    schema: Literal[1]
    manifest: Digest
    key: Key
    model: str
    parts: list[Part]


def rehash(layout: Layout, digest: str, pace: verified.Pace) -> None:
    """Read all bytes of a version's forms and compare; `pace` is called with each count of bytes.

    Raises BundleRejected when one is damaged, StorageFault when the disk does not say.
    """
    root = layout.prepared / digest
    for name in files.names(root):
        if name.startswith("."):
            continue  # being made, or being removed
        folder = root / name
        data = files.read(folder / RECORD)
        if data is None:
            raise _damaged(digest, f"{RECORD} is missing")
        try:
            record = canonical.from_bytes(data, Record)
        except canonical.DecodeFault as e:
            raise _damaged(digest, f"{RECORD}: {e}") from e
        for part in record.parts:
            if verified.sha256_of(folder / part.name, pace) != part.sha256:
                raise _damaged(digest, f"{part.name} has another digest")


def _damaged(digest: str, what: str) -> BundleRejected:
    return BundleRejected(
        Reason.DIGEST_MISMATCH,
        f"the prepared form of version {digest[:12]} is damaged: {what}",
        "it is made again; if this repeats, check the disk",
    )
