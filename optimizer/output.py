"""The output folder: what may be replaced, and how the new content gets there whole.

It knows names and renames, not what the files say.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edge_contract.errors import InputRejected, Reason

BUNDLE = "bundle"
CANDIDATES = "candidates"
REPORT_JSON = "report.json"
REPORT_HTML = "report.html"
# What a report's `kind` says, so that a folder can be recognised as an earlier output.
KIND = "edge-optimize report"

_FOLDERS = (BUNDLE, CANDIDATES)
_FILES = (REPORT_JSON, REPORT_HTML)
_STAGING = ".staging-"


def check(output: Path) -> None:
    """Raises InputRejected unless `output` is absent, empty, or an earlier output of edge-optimize."""
    if not output.exists():
        return
    if not output.is_dir():
        raise _taken(output, "is a file")
    names = {entry.name for entry in output.iterdir() if not entry.name.startswith(_STAGING)}
    if not names:
        return
    foreign = sorted(names - {*_FOLDERS, *_FILES})
    if foreign:
        raise _taken(output, f"holds {foreign[0]!r}, which edge-optimize did not write")
    if not _is_report(output / REPORT_JSON):
        raise _taken(output, f"has no {REPORT_JSON} of edge-optimize")


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A folder to fill; when the block ends well, its content replaces that of `output`.

    The bundle leaves first and comes last, whole and on the disk: none is ever half there, and none lies
    beside the report of another run. If the block raises, `output` is as it was.
    """
    existed = output.exists()
    output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=_STAGING, dir=output))
    try:
        yield folder
        _publish(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not existed:
            with suppress(OSError):  # not empty: it was filled
                output.rmdir()


def _publish(folder: Path, output: Path) -> None:
    _sync_tree(folder)
    for name in _FOLDERS:
        if (output / name).exists():
            (output / name).rename(folder / f"old-{name}")
    for name in _FILES:
        (folder / name).replace(output / name)
    _sync(output)
    for name in reversed(_FOLDERS):
        if (folder / name).exists():
            (folder / name).rename(output / name)
    _sync(output)
    for stale in output.glob(f"{_STAGING}*"):
        shutil.rmtree(stale, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_report(path: Path) -> bool:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.get("kind") == KIND


def _taken(output: Path, problem: str) -> InputRejected:
    return InputRejected(
        Reason.BAD_INPUT, f"the output folder {output} {problem}", "give an empty or new folder to --output"
    )
