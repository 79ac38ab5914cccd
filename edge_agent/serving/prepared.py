"""This device's own form of a model: optimised, its weights packed for this CPU, so that a load maps it.

It is made once, by preflight, and only read afterwards; the model of the bundle stays beside it in the store
and serves whenever the form is missing, damaged, or of another runtime or CPU. Which of the two is loaded
is decided in loader.py.
"""

from __future__ import annotations

import logging
import shutil
from functools import cache
from pathlib import Path

from edge_agent import facts, files
from edge_agent.forms import RECORD, Key, Part, Record
from edge_agent.serving import package
from edge_agent.serving.backends.base import Spec, form_version, optimise
from edge_contract import canonical
from edge_contract.console import os_fault
from edge_contract.errors import EdgewardError, Reason, StorageFault
from edge_contract.manifest import Manifest

_log = logging.getLogger("edge_agent.serving")


def key_of(manifest: Manifest) -> Key | None:
    """The key of the form that this device would make; None when its runtime has none. Raises DeviceUnfit."""
    version = form_version(manifest.runtime)
    if version is None:
        return None
    cpu, isa = _processor()
    session = manifest.session
    return Key(f"{manifest.runtime} {version}", cpu, isa, session.threads, session.spinning)


def find(root: Path, stored: package.Package, *, hashed: bool = False) -> Path | None:
    """The model file of this device's form of a version, if there is a sound one below `root`.

    Sizes, inodes and times of change are compared with the record; where they differ, or with `hashed`,
    digests are. Raises DeviceUnfit without the runtime.
    """
    key = key_of(stored.manifest)
    if key is None:
        return None
    folder = root / stored.digest / key.name
    try:
        data = files.read(folder / RECORD)
        if data is None:
            return None
        record = canonical.from_bytes(data, Record)
        damaged = [p.name for p in record.parts if not _is_sound(folder / p.name, p, hashed=hashed)]
    except (EdgewardError, canonical.DecodeFault) as e:
        _log.error("the prepared form of %s cannot be used: %s", stored.label, e)
        return None
    if (record.manifest, record.key) != (stored.digest, key):
        damaged = [RECORD]
    if damaged:
        _log.error("the prepared form of %s is damaged: %s", stored.label, ", ".join(damaged))
        return None
    return folder / record.model


def build(root: Path, stored: package.Package, key: Key, spec: Spec, max_bytes: int) -> Path:
    """Write the form beside the place where `keep` will put it; returns its model file.

    Raises StorageFault when it would take more than `max_bytes` or the disk gives no room, and what a load
    raises.
    """
    if spec.model.stat().st_size > max_bytes:  # packed weights take at least as much as plain ones
        raise _no_room(stored, max_bytes)
    folder = root / stored.digest
    files.make_folder(folder)
    files.remove_leftovers(folder)
    building = files.temporary(folder / f"new-{key.name}")  # not where an old form goes to be removed
    files.make_folder(building)
    model = optimise(spec, building)
    if sum(p.stat().st_size for p in building.iterdir()) > max_bytes:
        discard(model)
        raise _no_room(stored, max_bytes)
    return model


def keep(model: Path, stored: package.Package, key: Key) -> Path:
    """Make a form that was built, and found right, the device's own; returns its model file's new place.

    Forms of the same version under other keys are dropped: this runtime and CPU cannot use them. Raises
    StorageFault.
    """
    building = model.parent
    final = building.with_name(key.name)
    parts = [_part(path) for path in sorted(building.iterdir())]
    record = Record(1, stored.digest, key, model.name, parts)
    files.write(building / RECORD, canonical.to_bytes(record))
    for other in building.parent.iterdir():
        if other != building:
            files.remove_tree(other)
    files.install_folder(building, final)
    return final / model.name


def discard(model: Path) -> None:
    """Remove a form that was built and will not be kept."""
    shutil.rmtree(model.parent, ignore_errors=True)  # what stays is removed before the next is built


@cache
def _processor() -> tuple[str, list[str]]:
    return facts.processor()


def _part(path: Path) -> Part:
    try:
        status = path.stat()
    except OSError as e:
        raise os_fault(e) from e
    return Part(path.name, status.st_size, package.file_digest(path), status.st_ino, status.st_mtime_ns)


def _is_sound(path: Path, part: Part, *, hashed: bool) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    if status.st_size != part.size_bytes:
        return False
    if not hashed and (status.st_ino, status.st_mtime_ns) == (part.inode, part.mtime_ns):
        return True
    return package.file_digest(path) == part.sha256


def _no_room(stored: package.Package, max_bytes: int) -> StorageFault:
    return StorageFault(
        Reason.DISK_FULL,
        f"the prepared form of {stored.label} takes more than the {max_bytes} bytes there are for it",
        "free space, or raise update.prepared_max_bytes; until then the model itself is loaded",
    )
