"""Which releases this device has committed, and so which are too old for it. The floor is floor.py's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress

from edge_agent.update.floor import Floor
from edge_agent.update.journal import Entry, Ref
from edge_agent.update.levels import OrderFloor, with_releases
from edge_agent.update.store import Store
from edge_contract.errors import BundleRejected


def min_release(orders: Floor[OrderFloor], entry: Entry) -> int:
    """The oldest release that is no downgrade; any, where the operator allows it.

    Raises StorageFault while the disk does not give the floor.
    """
    return 0 if entry.permissions.downgrade else orders.known().releases.get(entry.name, 0)


def raise_releases(orders: Floor[OrderFloor], store: Store, versions: Mapping[str, Iterable[Ref]]) -> None:
    """These versions are committed: the floor of each model is at least their release.

    Idempotent. A version whose manifest is damaged says nothing. Raises StorageFault.
    """
    releases: dict[str, int] = {}
    for name, refs in versions.items():
        for ref in refs:
            with suppress(BundleRejected):
                releases[name] = max(releases.get(name, 0), store.manifest_of(ref.digest).release)
    orders.raise_to(with_releases(orders.value, releases))
