"""Fashion-MNIST as arrays, and the one rule about which images may be used for what.

It reads the four `idx` files that Debian's package `dataset-fashion-mnist` installs. It does not download
anything, and it does not choose the small splits: that is `splits.py`.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
HELD_OUT = 2000  # last images of the training part, never trained on
SIDE = 28

UInt8Array = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]
LabelArray = npt.NDArray[np.int64]


class DatasetUnreadable(Exception):
    """A dataset file is missing, damaged or of another kind. The message names it and the next step."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Pixels uint8 [N, 28, 28], 0..255, and labels int64 [N], 0..9, in the order of the file."""

    pixels: UInt8Array
    labels: LabelArray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: slice | LabelArray) -> Examples:
        return Examples(self.pixels[rows], self.labels[rows])


def read_train_part(folder: Path) -> Examples:
    """All 60,000 training images. Raises DatasetUnreadable."""
    return _read_part(folder, "train")


def read_test_part(folder: Path) -> Examples:
    """All 10,000 test images. Raises DatasetUnreadable."""
    return _read_part(folder, "t10k")


def to_train_on(train_part: Examples) -> Examples:
    """The images the nets may learn from: everything but the held-out tail."""
    return train_part.take(slice(None, -HELD_OUT))


def held_out(train_part: Examples) -> Examples:
    """The tail no net learns from: calibration and selection come from here, unbiased by training."""
    return train_part.take(slice(-HELD_OUT, None))


def as_input(pixels: UInt8Array) -> FloatArray:
    """uint8 [N, 28, 28] → the nets' input `image`: float32 [N, 1, 28, 28], 0..1."""
    return pixels[:, np.newaxis].astype(np.float32) / np.float32(255)


def _read_part(folder: Path, part: str) -> Examples:
    pixels = _read_idx(folder / f"{part}-images-idx3-ubyte.gz", dimensions=3)
    labels = _read_idx(folder / f"{part}-labels-idx1-ubyte.gz", dimensions=1)
    if len(pixels) != len(labels) or pixels.shape[1:] != (SIDE, SIDE):
        raise DatasetUnreadable(
            f"{folder}: '{part}' has images {pixels.shape} and {len(labels)} labels, not N 28x28 images and "
            "N labels. Point --data at an unmodified Fashion-MNIST folder."
        )
    return Examples(pixels, labels.astype(np.int64))


def _read_idx(path: Path, dimensions: int) -> UInt8Array:
    """One gzipped idx file of bytes: magic (0, 0, 8, dimensions), big-endian sizes, then the data."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except FileNotFoundError as e:
        raise DatasetUnreadable(
            f"{path} is missing. Install Debian's package dataset-fashion-mnist, or pass --data FOLDER."
        ) from e
    except (OSError, EOFError, zlib.error) as e:
        raise DatasetUnreadable(f"{path} cannot be read ({e}). Install or copy it again.") from e
    header_bytes = 4 + 4 * dimensions
    if raw[:4] != bytes([0, 0, 8, dimensions]) or len(raw) < header_bytes:
        raise DatasetUnreadable(f"{path} is not an idx file of bytes in {dimensions} dimensions.")
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", count=dimensions, offset=4))
    data = np.frombuffer(raw, np.uint8, offset=header_bytes)
    if data.size != int(np.prod(shape)):
        raise DatasetUnreadable(f"{path} is cut short: {data.size} bytes for shape {shape}. Copy it again.")
    return data.reshape(shape)
