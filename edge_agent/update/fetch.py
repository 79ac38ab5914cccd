"""The fetch child: everything that parses untrusted downloads, in a process that lives for one update.

It speaks to its parent in JSON lines on standard output: `resolved`, `progress`, `replanned` when an
encoding was of no use, then the exit code of its outcome with `done` or `error` as the last line. The
parent's side is children.py.

Two locks: metadata and its floor are one process's at a time, and so is the staging folder. They are apart
so that a download of hours keeps nobody from learning of new keys.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_agent import facts, files
from edge_agent.config import Config
from edge_agent.layout import Layout
from edge_agent.update import documents, operators
from edge_agent.update.answers import Postponed
from edge_agent.update.download import Downloader
from edge_agent.update.floor import metadata_floor
from edge_agent.update.gate import Gate
from edge_agent.update.http import Client
from edge_agent.update.obtain import Means, Obtainer, Offers, encoded_digests, is_doubt
from edge_agent.update.staging import Staging
from edge_agent.update.store import Store
from edge_agent.update.trust import Target, Trust, local_source, source
from edge_contract import canonical, manifest
from edge_contract.console import error_dict, os_fault
from edge_contract.errors import DeviceUnfit, EdgewardError, Reason, StorageFault, TransferFailed
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
        self._config = config
        self._layout = Layout(config)
        self._store = Store(self._layout)
        self._staging = Staging(self._layout, self._store)
        self._client = Client(config.registry)
        self._gate = Gate(config.registry, self._layout)
        self._progress = _Progress()
        self._later_bytes = 0
        # Documents are small and always wanted: no gate, and no part of the progress.
        self._small = Downloader(config.registry, self._layout.staging, lambda _: None, client=self._client)

    def operators(self) -> None:
        """Refresh, then cache who may sign desired states and commands."""
        with self._trusting():
            self._refreshed()

    def version(self, name: str, version: str, digest: str, min_release: int) -> str:
        """Refresh, resolve, plan, download what is missing, install; returns what is worth telling of it."""
        with self._trusting():
            found, offers = self._resolve(name, version, digest)
        check_fit(found, facts.probe())
        _check_release(found, min_release)
        with self._staging.alone():
            return self._bring(found, digest, offers)

    def _bring(self, found: manifest.Manifest, digest: str, offers: Offers) -> str:
        sources, missing = self._look(found)
        source = self._source(missing, offers)
        wanted = {digest, *(blob.sha256 for blob in found.files), *encoded_digests(found.files, offers)}
        self._staging.sweep(wanted, self._config.registry.keep_parts_s)
        _say("resolved", missing_bytes=source.coming_bytes, total_bytes=found.size_bytes)
        self._gate.check(source.coming_bytes)
        self._make_room(source, missing, wanted, self._versions(sources))
        for blob in missing:
            self._later_bytes = source.coming_bytes_beside(blob)
            sources[blob.sha256] = source.obtain(blob)
        self._store.add(found, sources)
        self._staging.drop(wanted)
        return source.summary()

    def _versions(self, sources: dict[str, Path]) -> set[str]:
        """Stored versions that blobs are taken from: nothing may need them but this update."""
        return {path.parent.name for path in sources.values() if path.parent.parent == self._layout.store}

    def _make_room(
        self, source: Obtainer, missing: list[manifest.File], wanted: set[str], held: set[str]
    ) -> None:
        """An encoding takes space beside the blob; without that space, the blobs come whole."""
        reserve_bytes = self._config.update.disk_reserve_bytes
        try:
            self._staging.make_room([*missing, *source.encoded], reserve_bytes, wanted, held)
        except StorageFault as e:
            if e.reason is not Reason.DISK_FULL or not source.encoded:
                raise
            self._staging.drop({encoded.sha256 for encoded in source.encoded})
            source.give_up("there is no space for encoded blobs beside the whole ones")
            self._staging.make_room(missing, reserve_bytes, wanted, held)

    def _look(self, found: manifest.Manifest) -> tuple[dict[str, Path], list[manifest.File]]:
        """What is here, by digest, and what is missing."""
        here: dict[str, Path] = {}
        missing: dict[str, manifest.File] = {}
        for blob in found.files:
            path = self._store.find_blob(blob) or self._staging.whole(blob)
            if path is None:
                missing[blob.sha256] = blob
            else:
                here[blob.sha256] = path
        return here, list(missing.values())

    def _source(self, missing: list[manifest.File], offers: Offers) -> Obtainer:
        downloader = Downloader(
            self._config.registry,
            self._layout.staging,
            self._progress.count,
            client=self._client,
            gate=lambda rest_bytes: self._gate.check(rest_bytes + self._later_bytes),
        )
        means = Means(
            self._store.blobs() if missing else {},
            frozenset(facts.encodings()),
            self._config.update.patch_memory_bytes,
        )
        return Obtainer(self._staging, downloader, means, missing, offers, self._replanned)

    def _replanned(self, coming_bytes: int, why: str) -> None:
        missing_bytes = self._progress.done_bytes + coming_bytes
        _say("replanned", missing_bytes=missing_bytes, why=why)

    @contextmanager
    def _trusting(self) -> Iterator[None]:
        descriptor = files.lock(self._layout.trust / ".lock")
        try:
            yield
        finally:
            os.close(descriptor)

    def _refreshed(self) -> Trust:
        trust = Trust(
            self._layout.trust / "metadata",
            source(self._config.registry, self._client),
            metadata_floor(self._layout),
            clock_s=time.time(),
        )
        trust.refresh()
        data = documents.operators(trust, self._read_operators)
        operators.keep(self._layout.trust / operators.FILE, data)
        return trust

    def _resolve(self, name: str, version: str, digest: str) -> tuple[manifest.Manifest, Offers]:
        """The manifest and what its blobs are offered as, by metadata as the registry has it now.

        While the registry is away, the manifest by what was verified last.

        That is no weaker: whoever can cut the network could also hold back what is new, for as long as the
        metadata has not expired. With it, a version that was brought by hand needs no network.
        """
        try:
            trust = self._refreshed()
            found = documents.version(trust, self._read, name, version, digest)
            return found, self._offers(trust, found, digest)
        except TransferFailed as e:
            if e.reason is not Reason.REGISTRY_UNREACHABLE:
                raise
            folder = self._layout.trust / "metadata"
            local = local_source(self._config.registry, folder)
            trust = Trust(folder, local, metadata_floor(self._layout), clock_s=time.time())
            try:
                trust.refresh()
                return documents.version(trust, self._read_staged, name, version, digest), None
            except TransferFailed:
                raise e from None  # nothing is here already: the network is what is missing

    def _offers(self, trust: Trust, found: manifest.Manifest, digest: str) -> Offers:
        """Trouble with the list of encodings costs bytes, not the update."""
        try:
            return documents.encodings_of(trust, self._read_once, found, digest)
        except EdgewardError as e:
            if not is_doubt(e):
                raise
            return str(e)

    def _read_operators(self, target: Target) -> bytes:
        """Only when they have changed: they are looked at every hour."""
        known = operators.cached(self._layout.trust / operators.FILE)
        if known is not None and canonical.sha256_hex(known) == target.sha256:
            return known
        return self._read_once(target)

    def _read_once(self, target: Target) -> bytes:
        """Without keeping it for a resumption."""
        try:
            return self._read(target)
        finally:
            self._staging.drop({target.sha256})

    def _read(self, target: Target) -> bytes:
        path = self._small.fetch(manifest.blob_path(target.sha256), target.sha256, target.length)
        return files.read(path) or b""

    def _read_staged(self, target: Target) -> bytes:
        return files.read(self._layout.staging / target.sha256) or b""


class _Progress:
    """Counts what comes and says so, now and then."""

    def __init__(self) -> None:
        self.done_bytes = 0
        self._said_s = 0.0

    def count(self, count: int) -> None:
        """So many bytes came, or, negative, were thrown away."""
        self.done_bytes += count
        now_s = time.monotonic()
        if now_s - self._said_s >= _PROGRESS_EVERY_S:
            self._said_s = now_s
            _say("progress", done_bytes=max(0, self.done_bytes))


def _check_release(found: manifest.Manifest, min_release: int) -> None:
    """An old version, however well signed, may have a fault that a newer one was published to end."""
    if found.release < min_release:
        raise DeviceUnfit(
            Reason.ROLLBACK_REFUSED,
            f"{found.name}@{found.version} is release {found.release}, this device has committed release "
            f"{min_release} of {found.name}",
            "if an older version is wanted, deploy it with `edge-fleet deploy --allow-downgrade`",
        )


def _report(work: Callable[[], str | None]) -> int:
    try:
        detail = work()
    except (EdgewardError, OSError) as e:
        error = os_fault(e) if isinstance(e, OSError) else e
        pause = {"retry_after_s": error.retry_after_s} if isinstance(error, Postponed) else {}
        _say("error", **error_dict(error), **pause)
        return error.exit_code
    _say("done", **({"detail": detail} if detail else {}))
    return 0


def _say(event: str, **fields: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()
