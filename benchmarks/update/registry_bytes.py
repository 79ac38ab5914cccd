"""Bytes of metadata that a device fetches for one version, by how many versions the registry has.

`python benchmarks/update/registry_bytes.py [--versions 64 2000 10000] [--json]`. Real registries, signed by
edge-fleet's own code; the client is python-tuf's, with its bytes counted: a device that knows only the root,
one that comes back after a publication, one after a refresh. CPU seconds are this process's, for publishing
one version more. `plain` is what one targets file with everything in it would take.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from edge_contract.manifest import target_name

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.ngclient import Client
from tests.support.registry_folder import RegistryFolder

COLUMNS = ("versions", "new_device", "after_publish", "after_refresh", "plain", "publish_cpu_s")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", type=int, nargs="+", default=[64, 2000, 10_000], help="how many")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    rows = []
    for versions in options.versions:
        with tempfile.TemporaryDirectory(prefix="ew-") as name:
            rows.append(_measure(Path(name), versions))
    if options.json:
        print(json.dumps(rows))
        return 0
    print("".join(f"{column:>15}" for column in COLUMNS))
    for row in rows:
        print("".join(f"{row[column]:15,}" for column in COLUMNS))
    return 0


def _measure(work: Path, versions: int) -> dict[str, float]:
    made = RegistryFolder.create(work)
    names = made.publish_many("fashion", versions)
    device = Client(made.folder, work / "device", made.root.read_bytes())
    found = {"versions": versions, "new_device": _fetched(device, names[-1])}
    started_s = time.process_time()
    made.publish_many("digits", 1)
    publish_cpu_s = time.process_time() - started_s
    found["after_publish"] = _fetched(device, target_name("digits", "1"))
    made.refresh()
    found["after_refresh"] = _fetched(device, target_name("digits", "1"))
    return {**found, "plain": _plain(made), "publish_cpu_s": round(publish_cpu_s, 2)}


def _fetched(device: Client, name: str) -> int:
    if device.find(name) is None:
        raise RuntimeError(name)
    return device.fetched_bytes


def _plain(made: RegistryFolder) -> int:
    with made.opened() as repo:
        entries = {name: found.to_dict() for name, found in repo.draft.tree.every().items()}
        return len(json.dumps(entries, separators=(",", ":")))


if __name__ == "__main__":
    sys.exit(main())
