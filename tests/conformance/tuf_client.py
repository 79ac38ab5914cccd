#!/usr/bin/env python3
"""A client for the TUF conformance suite: `init`, `refresh` and `download` by the agent's own code.

Metadata goes through edge_agent/update/trust.py with its floor, targets through update/download.py there.
What a device has and the suite does not know (floor, staging, pinned root) lies beside the suite's folder of
metadata. README.md says how to run the suite.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import urllib3

sys.path.insert(0, str(Path(__file__).parents[2]))

from edge_agent import files
from edge_agent.config import Registry
from edge_agent.update.download import Downloader
from edge_agent.update.floor import Floor
from edge_agent.update.http import Client
from edge_agent.update.levels import MetadataFloor
from edge_agent.update.trust import Source, Trust
from edge_contract.errors import BundleRejected, EdgewardError, Reason, TransferFailed

_TIMEOUT_S = 10.0
# The device itself knows SHA-256 alone; these the suite may use instead of it.
_OTHER_DIGESTS = ("sha512", "sha384", "sha224")


def main() -> int:
    """Exit code 0 when all that was asked for was done, 1 otherwise."""
    options = _options()
    metadata = Path(options.metadata_dir)
    beside = metadata.parent / "edgeward"
    files.make_folder(beside)
    try:
        if options.command == "init":
            shutil.copyfile(options.root, metadata / "root.json")
            shutil.copyfile(options.root, beside / "root.json")
            return 0
        floor = Floor((beside / "one.floor", beside / "two.floor"), MetadataFloor())
        registry = Registry(url=options.metadata_url, root=str(beside / "root.json"), timeout_s=_TIMEOUT_S)
        client = Client(registry)
        trust = Trust(metadata, Source(registry, client, f"{client.base}/"), floor, time.time())
        trust.refresh()
        if options.command == "download":
            base = Registry(url=options.target_base_url, timeout_s=_TIMEOUT_S, retries=1)
            for name in options.target_name:
                _download(trust, metadata, base, name, Path(options.target_dir), beside / "staging")
    except EdgewardError as e:
        print(e, file=sys.stderr)
        return 1
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--metadata-dir", required=True)
    parser.add_argument("--metadata-url")
    parser.add_argument("--target-name", action="append", default=[])
    parser.add_argument("--target-dir")
    parser.add_argument("--target-base-url")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("root")
    commands.add_parser("refresh")
    commands.add_parser("download")
    return parser.parse_args()


def _download(trust: Trust, metadata: Path, base: Registry, name: str, folder: Path, staging: Path) -> None:
    found = trust.hashes(name)
    if found is None:
        raise TransferFailed(Reason.NOT_PUBLISHED, f"{name} is not a target", "publish it")
    length, hashes = found
    target = folder / quote(name, "")
    kind = next((k for k in ("sha256", *_OTHER_DIGESTS) if k in hashes), None)
    if kind is None:
        raise BundleRejected(Reason.TRUST_FAILED, f"{name} has no digest that is known here", "use SHA-256")
    if target.is_file() and hashlib.new(kind, target.read_bytes()).hexdigest() == hashes[kind]:
        return
    path = _path(metadata, name, hashes[kind])
    if kind == "sha256":
        files.make_folder(staging)
        staged = Downloader(base, staging, lambda _: None).fetch(path, hashes[kind], length)
        shutil.move(staged, target)
    else:
        target.write_bytes(_fetch(f"{base.url.rstrip('/')}/{path}", kind, hashes, length))


def _path(metadata: Path, name: str, digest: str) -> str:
    """Where the repository keeps a target: under its digest, when its snapshots are consistent."""
    root = json.loads((metadata / "root.json").read_text())
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{digest}.{file}" if root["signed"]["consistent_snapshot"] else name


def _fetch(url: str, kind: str, hashes: Mapping[str, str], length: int) -> bytes:
    data = urllib3.request("GET", url, timeout=_TIMEOUT_S, retries=False).data
    if len(data) != length or hashlib.new(kind, data).hexdigest() != hashes[kind]:
        raise BundleRejected(Reason.DIGEST_MISMATCH, f"{url} has another {kind}", "publish it again")
    return data


if __name__ == "__main__":
    sys.exit(main())
