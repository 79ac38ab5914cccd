"""Filesystems of a test's own: ext4 in a file, copied while it is in use; tmpfs that is small or read-only.

They need the right to mount. Where it is missing, the tests that ask for it fail: under CI it must be there.
"""

from __future__ import annotations

import subprocess
from pathlib import Path


class Ext4:
    """An ext4 filesystem in a file."""

    def __init__(self, image: Path, size_mb: int = 24) -> None:
        """Makes it."""
        self.image = image
        with image.open("wb") as stream:
            stream.truncate(size_mb << 20)
        _do("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(image))

    def snapshot(self, copy: Path) -> Path:
        """What a power cut at this moment would leave: what has not been written yet is missing."""
        _do("cp", "--sparse=always", str(self.image), str(copy))
        return copy


def mount_image(image: Path, folder: Path) -> None:
    """Mount a file with a filesystem."""
    _do("mount", "-o", "loop", str(image), str(folder))


def mount_tmpfs(folder: Path, size_bytes: int) -> None:
    """Mount memory."""
    _do("mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder))


def remount(folder: Path, options: str) -> None:
    """Change a mounted filesystem, for instance to `ro`."""
    _do("mount", "-o", f"remount,{options}", str(folder))


def unmount(folder: Path) -> None:
    """Unmount, also when somebody still has a file open."""
    _do("umount", "-l", str(folder))


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()} (are you root?)"
