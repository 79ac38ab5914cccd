"""The note in a root that stands between two sets of keys, saying where a rotation comes from and goes.

Whoever rotates again after a kill finishes what the note says instead of starting anew. It is signed with the
root, and only this program reads it; devices know nothing of it.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

# python-tuf documents this name here without listing it in __all__.
from tuf.api.metadata import Root  # type: ignore[attr-defined]

from edge_contract.errors import BundleRejected, Reason
from fleet.registry.signers import Authority

FIELD = "x-edgeward-rotating"


class Note(NamedTuple):
    """The keys that a role had before its rotation and those that it is to have."""

    old: Authority
    final: Authority


class _Keys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keyids: list[str]
    threshold: Annotated[int, Meta(ge=1)]


class _Written(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    old: _Keys
    final: _Keys


def write(root: Root, role: str, note: Note | None) -> None:
    """Leave a note for a role, or remove it."""
    notes = dict(root.unrecognized_fields.get(FIELD, {}))
    notes.pop(role, None)
    if note is not None:
        notes[role] = {
            "old": {"keyids": list(note.old.keys), "threshold": note.old.threshold},
            "final": {"keyids": list(note.final.keys), "threshold": note.final.threshold},
        }
    root.unrecognized_fields.pop(FIELD, None)
    if notes:
        root.unrecognized_fields[FIELD] = notes


def read(root: Root, role: str) -> Note | None:
    """The note for a role, if its rotation was not finished. Raises BundleRejected for a damaged one."""
    try:
        plain = root.unrecognized_fields.get(FIELD, {}).get(role)
        if plain is None:
            return None
        found = msgspec.convert(plain, _Written)
        return Note(*(_authority(root, keys) for keys in (found.old, found.final)))
    except (AttributeError, KeyError, msgspec.ValidationError) as e:
        raise BundleRejected(
            Reason.TRUST_FAILED,
            f"the root's {FIELD} is damaged: {e}",
            "restore the registry from a copy, or use the version of edgeward that signed it",
        ) from e


def _authority(root: Root, named: _Keys) -> Authority:
    return Authority({keyid: root.keys[keyid] for keyid in named.keyids}, named.threshold)
