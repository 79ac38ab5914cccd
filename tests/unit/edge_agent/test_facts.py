"""What a device says of itself: here, which encodings of blobs it can decode."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edge_agent import facts
from edge_contract.encodings import LANES, PATCHES, WHOLE, ZSTD, ZSTD_PATCH


def test_with_everything_installed_all_encodings_are_read() -> None:
    assert facts.probe().encodings == sorted(PATCHES | WHOLE)


@pytest.mark.parametrize(
    ("missing", "reads"),
    [
        (("backports", "_zstd"), [LANES]),
        (("_lzma",), [ZSTD, ZSTD_PATCH]),
        (("_bz2",), [ZSTD, ZSTD_PATCH]),
        (("_bz2", "backports", "_zstd"), []),
    ],
)
def test_what_this_python_lacks_is_not_promised(missing: tuple[str, ...], reads: list[str]) -> None:
    """In a Python of its own, where these modules cannot be found."""
    code = f"""
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Without())
from edge_agent import facts
print(*facts.encodings())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == reads
