"""The start counter: a version that kills the process while it loads must not do so for ever.

Before a version is loaded at start, its count is raised on disk; once it has loaded and warmed up, the
count is removed. A count left over is a start that did not survive. Which version to load instead is
decided in models.py; a load that fails without killing the process is not counted.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import msgspec

from edge_agent import files
from edge_contract import canonical
from edge_contract.errors import StorageFault
from edge_contract.manifest import Count, Digest

_log = logging.getLogger("edge_agent.serving")


class _Counts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Failed starts by digest: the version before may be the one that kills the process, too."""

    schema: Literal[1]
    failed: dict[Digest, Count]


class Starts:
    """Counts of all models, one file each.

    A disk that cannot be written must not keep models from being served, nor a version from being counted:
    then the counts are kept in `spare`, in memory, and that file goes before the one on disk. Where neither
    takes it nothing is counted, and the log says so.
    """

    def __init__(self, folder: Path, spare: Path) -> None:
        self._folder, self._spare = folder, spare

    def failed(self, name: str, digest: str) -> int:
        """How many starts with this version have not survived since it last loaded."""
        return self._read(name).get(digest, 0)

    def begin(self, name: str, digest: str) -> None:
        """Count a start, durably, before the version is touched."""
        counts = self._read(name)
        self._write(name, counts | {digest: counts.get(digest, 0) + 1})

    def survived(self, name: str, digest: str) -> None:
        """The version has loaded and warmed up: forget its failed starts."""
        counts = self._read(name)
        if counts.pop(digest, None) is not None:
            self._write(name, counts)

    def abandoned(self, name: str, digest: str) -> None:
        """The start was ended from outside before the version had loaded: take this one back."""
        counts = self._read(name)
        counts[digest] = counts.get(digest, 0) - 1
        self._write(name, {d: n for d, n in counts.items() if n > 0})

    def _read(self, name: str) -> dict[str, int]:
        for folder in (self._spare, self._folder):
            try:
                data = files.read(folder / f"{name}.json")
                if data is not None:
                    return dict(canonical.from_bytes(data, _Counts).failed)
            except (StorageFault, canonical.DecodeFault) as e:
                _log.error("start counter of %s cannot be read and counts from zero: %s", name, e)
        return {}

    def _write(self, name: str, counts: dict[str, int]) -> None:
        file = f"{name}.json"
        try:
            files.make_folder(self._folder)
            if counts:
                files.write(self._folder / file, canonical.to_bytes(_Counts(1, counts)))
            else:
                files.remove_link(self._folder / file)
            files.remove_link(self._spare / file)
        except StorageFault as e:
            _log.error("start counter of %s cannot be written: %s", name, e)
            self._write_spare(file, counts)

    def _write_spare(self, file: str, counts: dict[str, int]) -> None:
        """Also when there is nothing to count: the file on disk may say otherwise, and is out of date."""
        try:
            files.make_folder(self._spare)
            files.write(self._spare / file, canonical.to_bytes(_Counts(1, counts)))
        except StorageFault as e:
            _log.error("nothing is counted: %s", e)
