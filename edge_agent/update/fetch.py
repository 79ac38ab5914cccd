"""The fetch child: everything that parses untrusted downloads, in a process that lives for one update.

It speaks to its parent in JSON lines on standard output: `resolved`, `progress`, then the exit code
of its outcome with `done` or `error` as the last line. The parent's side is children.py.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_agent import facts, files
from edge_agent.config import Config
from edge_agent.layout import Layout
from edge_agent.update.download import Downloader
from edge_agent.update.floor import metadata_floor
from edge_agent.update.http import Client
from edge_agent.update.operators import FILE as OPERATORS_FILE
from edge_agent.update.store import Store
from edge_agent.update.trust import Target, Trust, source
from edge_contract import canonical, manifest, wire
from edge_contract.console import error_dict, os_fault
from edge_contract.errors import (
    BundleRejected,
    DeviceUnfit,
    EdgewardError,
    Reason,
    StorageFault,
    TransferFailed,
)
from edge_contract.profile import check_fit

_PROGRESS_EVERY_S = 0.2


def run_fetch(config: Config, name: str, version: str, digest: str, min_release: int = 0) -> int:
    """Bring `name`@`version` whole into the store, unless its release is older. Returns the exit code."""
    return _report(lambda: _Fetch(config).version(name, version, digest, min_release))


def run_trust(config: Config) -> int:
    """Refresh metadata and the operators' keys. Returns the exit code."""
    return _report(lambda: _Fetch(config).operators())


class _Fetch:
    def __init__(self, config: Config) -> None:
        self._layout = Layout(config)
        self._store = Store(self._layout)
        self._lock = files.lock(self._layout.staging / ".lock")
        self._reserve_bytes = config.update.disk_reserve_bytes
        client = Client(config.registry)
        self._trust = Trust(
            self._layout.trust / "metadata",
            source(config.registry, client),
            metadata_floor(self._layout),
            clock_s=time.time(),
        )
        self._resolved = False
        self._done_bytes = 0
        self._said_s = 0.0
        self._downloader = Downloader(config.registry, self._layout.staging, self._progress, client=client)

    def operators(self) -> None:
        """Refresh, then cache who may sign desired states and commands."""
        self._trust.refresh()
        target = self._trust.target(wire.OPERATORS_TARGET)
        if target is None:
            raise BundleRejected(
                Reason.TRUST_FAILED,
                "the registry names no operators",
                "make the registry with `edge-fleet registry init`, which publishes their keys",
            )
        data = self._signed_bytes(target)
        wire.decode(data, wire.Operators)
        cache = self._layout.trust / OPERATORS_FILE
        if files.read(cache) != data:
            files.write(cache, data)

    def version(self, name: str, version: str, digest: str, min_release: int) -> None:
        """Refresh, resolve, plan, download what is missing, install."""
        self.operators()
        found = self._resolve(name, version, digest)
        _check_release(found, min_release)
        sources: dict[str, Path] = {}
        missing: list[manifest.File] = []
        for blob in found.files:
            have = self._store.find_blob(blob)
            if have is None:
                missing.append(blob)
            else:
                sources[blob.sha256] = have
        self._check_space(missing)
        _say("resolved", missing_bytes=sum(b.size_bytes for b in missing), total_bytes=found.size_bytes)
        self._resolved = True
        for blob in missing:
            path = manifest.blob_path(blob.sha256)
            sources[blob.sha256] = self._downloader.fetch(path, blob.sha256, blob.size_bytes)
        self._store.add(found, sources)
        self._clear_staging()

    def _resolve(self, name: str, version: str, digest: str) -> manifest.Manifest:
        label = f"{name}@{version}"
        target = self._trust.target(manifest.target_name(name, version))
        if target is None:
            raise TransferFailed(
                Reason.NOT_PUBLISHED,
                f"{label} is not in the registry's signed metadata",
                "publish it with `edge-fleet registry publish`; the device looks again by itself",
            )
        if target.sha256 != digest:
            raise BundleRejected(
                Reason.TRUST_FAILED,
                f"desired state names {label} as {digest[:12]}…, signed metadata as {target.sha256[:12]}…",
                "deploy again; if this repeats, operator and registry disagree on what was published",
            )
        found = manifest.from_bytes(self._signed_bytes(target))
        if (found.name, found.version) != (name, version):
            raise BundleRejected(
                Reason.MANIFEST_INVALID,
                f"the manifest published as {label} calls itself {found.name}@{found.version}",
                "publish the bundle under its own name",
            )
        if canonical.sha256_hex(manifest.to_bytes(found)) != digest:
            raise BundleRejected(
                Reason.MANIFEST_INVALID,
                f"the manifest of {label} is not in its canonical form",
                "publish the bundle as edge-optimize wrote it",
            )
        check_fit(found, facts.probe())
        return found

    def _signed_bytes(self, target: Target) -> bytes:
        if target.length > manifest.LIMIT_BYTES:
            raise BundleRejected(
                Reason.MANIFEST_INVALID,
                f"a signed document of {target.length} bytes is over the limit of {manifest.LIMIT_BYTES}",
                "publish a smaller manifest",
            )
        path = self._downloader.fetch(manifest.blob_path(target.sha256), target.sha256, target.length)
        data = files.read(path)
        path.unlink(missing_ok=True)  # small, and read: only blobs are worth keeping for a resumption
        if data is None or canonical.sha256_hex(data) != target.sha256:
            raise TransferFailed(
                Reason.DIGEST_MISMATCH, f"staged file {path.name[:12]}… is damaged", "it is fetched again"
            )
        return data

    def _check_space(self, missing: list[manifest.File]) -> None:
        staged = sum(
            path.stat().st_size
            for blob in missing
            for path in self._layout.staging.glob(f"{blob.sha256}*")
            if path.is_file()
        )
        need = sum(b.size_bytes for b in missing) - staged + self._reserve_bytes
        free = files.free_bytes(self._layout.staging)
        if need > free:
            raise StorageFault(
                Reason.DISK_FULL,
                f"the update needs {need} bytes with its reserve, {self._layout.state} has {free} free",
                "free space on the device, or lower [update] disk_reserve_bytes",
            )

    def _clear_staging(self) -> None:
        for path in self._layout.staging.iterdir():
            if path.is_file() and not path.name.startswith("."):
                path.unlink()

    def _progress(self, count: int) -> None:
        if not self._resolved:
            return  # the manifest itself: not part of the plan
        self._done_bytes += count
        now_s = time.monotonic()
        if now_s - self._said_s >= _PROGRESS_EVERY_S:
            self._said_s = now_s
            _say("progress", done_bytes=self._done_bytes)


def _check_release(found: manifest.Manifest, min_release: int) -> None:
    """An old version, however well signed, may have a fault that a newer one was published to end."""
    if found.release < min_release:
        raise DeviceUnfit(
            Reason.ROLLBACK_REFUSED,
            f"{found.name}@{found.version} is release {found.release}, this device has committed release "
            f"{min_release} of {found.name}",
            "if an older version is wanted, deploy it with `edge-fleet deploy --allow-downgrade`",
        )


def _report(work: Callable[[], None]) -> int:
    try:
        work()
    except (EdgewardError, OSError) as e:
        error = os_fault(e) if isinstance(e, OSError) else e
        _say("error", **error_dict(error))
        return error.exit_code
    _say("done")
    return 0


def _say(event: str, **fields: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()
