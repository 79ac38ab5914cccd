"""Makes the three small splits the optimizer works with: `calibration.npz`, `selection.npz`, `test.npz`.

Calibration and selection come from the training images that `train.py` holds out, the test split from the
test set; no image is in two of them. The same dataset gives the same bytes on every run (another zlib may
compress to other bytes, of equal content). It needs numpy and the dataset, nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    import dataset
    import numpy as np
    import numpy.typing as npt
    from dataset import Examples, LabelArray
except ImportError as e:
    sys.exit(f"splits: {e.name} is missing. Install the extra: pip install 'edgeward[optimizer]'")

CALIBRATION = 256
SELECTION_PER_CLASS = 100
TEST_PER_CLASS = 200
SEED = "edgeward fashion-mnist splits 1"
ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest a zip file can say; fixed, so that the bytes repeat


class TooFewImages(Exception):
    """The dataset cannot fill a split. The message says which class or split is short."""


def shuffled_rows(count: int, purpose: str) -> list[int]:
    """0..count-1 in an order fixed by SEED and `purpose` alone.

    Sorted by a digest rather than drawn from numpy's generator, whose stream may change between releases.
    """
    return sorted(range(count), key=lambda row: hashlib.sha256(f"{SEED}/{purpose}/{row}".encode()).digest())


def balanced_rows(labels: LabelArray, per_class: int, purpose: str) -> LabelArray:
    """Rows with exactly `per_class` of each class, in shuffled order. Raises TooFewImages."""
    wanted = dict.fromkeys(range(len(dataset.CLASSES)), per_class)
    rows = []
    for row in shuffled_rows(len(labels), purpose):
        if wanted[int(labels[row])] > 0:
            wanted[int(labels[row])] -= 1
            rows.append(row)
    short = [dataset.CLASSES[label] for label, missing in wanted.items() if missing]
    if short:
        raise TooFewImages(f"{purpose}: fewer than {per_class} images of {', '.join(short)}")
    return np.array(rows, np.int64)


def choose(train_part: Examples, test_part: Examples) -> dict[str, Examples]:
    """Split name → examples. Selection and test are balanced by class, calibration is plainly random."""
    held_out = dataset.held_out(train_part)
    selection = balanced_rows(held_out.labels, SELECTION_PER_CLASS, "selection")
    rest = np.setdiff1d(np.arange(len(held_out)), selection)
    if len(rest) < CALIBRATION:
        raise TooFewImages(f"calibration: {len(rest)} held-out images left, {CALIBRATION} needed")
    calibration = rest[shuffled_rows(len(rest), "calibration")[:CALIBRATION]]
    return {
        "calibration": held_out.take(calibration),
        "selection": held_out.take(selection),
        "test": test_part.take(balanced_rows(test_part.labels, TEST_PER_CLASS, "test")),
    }


def npz_bytes(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """What `np.savez_compressed` writes, with fixed times and attributes."""
    archive_bytes = io.BytesIO()
    with zipfile.ZipFile(archive_bytes, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", date_time=ZIP_TIME)
            info.create_system = 3  # Unix, on whatever system this runs
            archive.writestr(info, member.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)
    return archive_bytes.getvalue()


def write_splits(data: Path, output: Path) -> None:
    """Writes the three files into `output`. Raises DatasetUnreadable, TooFewImages, OSError."""
    splits = choose(dataset.read_train_part(data), dataset.read_test_part(data))
    output.mkdir(parents=True, exist_ok=True)
    for name, examples in splits.items():
        content = npz_bytes({"image": dataset.as_input(examples.pixels), "label": examples.labels})
        (output / f"{name}.npz").write_bytes(content)
        print(f"{output / name}.npz: {len(examples)} images, {len(content):,} bytes")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="splits.py", description=__doc__)
    parser.add_argument(
        "--data",
        type=Path,
        default=dataset.DEBIAN_FOLDER,
        metavar="DIR",
        help="folder with the four *-ubyte.gz files (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent,
        metavar="DIR",
        help="where the .npz files go (default: beside this script)",
    )
    return parser


def main() -> int:
    arguments = _parser().parse_args()
    try:
        write_splits(arguments.data, arguments.output)
    except (dataset.DatasetUnreadable, TooFewImages, OSError) as e:
        sys.exit(f"splits: {e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
