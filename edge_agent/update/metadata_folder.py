"""The folder of python-tuf's files: put in order before it is used, durable afterwards; and the pinned root.

What the files say is not looked at here.
"""

from __future__ import annotations

from pathlib import Path

from edge_agent import files
from edge_contract.errors import DeviceUnfit, Reason

_HISTORY = "root_history"


def pinned_root(path: Path) -> bytes:
    """The root that this device was given. Raises DeviceUnfit when there is none."""
    data = files.read(path)
    if data is None:
        raise DeviceUnfit(
            Reason.TRUST_FAILED,
            f"the pinned root {path} is missing",
            "copy root.json of the registry to the device and name it in [registry] root",
        )
    return data


def tidy(folder: Path) -> None:
    """Remove what python-tuf would stumble over: its cut-off writes, and files where folders belong.

    A filesystem check after a power cut may leave either. Nothing is lost: it is fetched again.
    """
    history = folder / _HISTORY
    for path in (folder, history):
        if path.is_symlink() or path.is_file():
            files.remove_link(path)
        files.make_folder(path)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink() and path != history:
            files.remove_tree(path)
        elif path != history and path.suffix != ".json":
            files.remove_link(path)
    for path in history.iterdir():
        if path.is_dir():
            files.remove_tree(path)


def sync(folder: Path) -> None:
    """Make all of it durable: python-tuf renames, but does not sync."""
    for each in (folder / _HISTORY, folder):
        for path in each.iterdir():
            if path.is_file() and not path.is_symlink():
                files.sync_file(path)
        files.sync_folder(each)
