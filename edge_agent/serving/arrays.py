"""Reading NPZ files: input samples for the benchmark, golden vectors of a bundle. It never unpickles."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_agent.serving.tensors import Array, describe, sample
from edge_contract.errors import BundleRejected, InputRejected, Reason
from edge_contract.manifest import Manifest, Tensor

_FAULTS = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)


class ArchiveFault(ValueError):
    """The file is not an NPZ of plain arrays, and why."""


@dataclass(frozen=True, slots=True)
class Golden:
    """One golden sample: what goes in, what has to come out."""

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


def read_npz(path: Path) -> dict[str, Array]:
    """All arrays by name. Raises ArchiveFault."""
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.lib.npyio.NpzFile):
                return {name: archive[name] for name in archive.files}
    except _FAULTS as e:
        raise ArchiveFault(f"{path.name} cannot be read as NPZ: {e}") from e
    raise ArchiveFault(f"{path.name} is a single array, not an NPZ archive")


def first_sample(path: Path, tensors: Sequence[Tensor]) -> dict[str, Array]:
    """The first sample of each tensor from an NPZ by name (`NAME` or `input:NAME`). Raises InputRejected."""
    if not path.is_file():
        raise InputRejected(
            Reason.BAD_INPUT, f"{path}: no such file", "name an existing NPZ file with --inputs"
        )
    try:
        arrays = read_npz(path)
    except ArchiveFault as e:
        raise InputRejected(Reason.BAD_INPUT, str(e), "write it with numpy.savez") from e
    return {t.name: _first(path, arrays, t) for t in tensors}


def _first(path: Path, arrays: Mapping[str, Array], tensor: Tensor) -> Array:
    stack = arrays.get(tensor.name, arrays.get(f"input:{tensor.name}"))
    if stack is None:
        have = ", ".join(sorted(arrays)) or "no arrays"
        raise InputRejected(
            Reason.DATA_MISMATCH,
            f"{path} has {have}; the model's input is {describe(tensor)}",
            f"save an array named {tensor.name!r}",
        )
    value = sample(stack, tensor, 0)
    if value is None:
        raise InputRejected(
            Reason.DATA_MISMATCH,
            f"{path}: {tensor.name!r} is {stack.dtype} {list(stack.shape)}; "
            f"the model takes {describe(tensor)}",
            "save samples along the first axis, in the model's datatype and shape",
        )
    return value


def golden_samples(path: Path, manifest: Manifest, most: int | None = None) -> list[Golden]:
    """The golden samples in order, all or the first `most`.

    Raises BundleRejected when the file is not what the manifest says.
    """
    try:
        arrays = read_npz(path)
    except ArchiveFault as e:
        raise BundleRejected(Reason.MANIFEST_INVALID, f"golden vectors: {e}", _REBUILD) from e
    return [
        Golden(
            {t.name: _golden(arrays, "input", t, i) for t in manifest.inputs},
            {t.name: _golden(arrays, "output", t, i) for t in manifest.outputs},
        )
        for i in range(manifest.golden.samples)[:most]
    ]


def _golden(arrays: Mapping[str, Array], side: str, tensor: Tensor, index: int) -> Array:
    stack = arrays.get(f"{side}:{tensor.name}")
    if stack is None:
        raise BundleRejected(
            Reason.MANIFEST_INVALID, f"golden vectors lack the array {side}:{tensor.name}", _REBUILD
        )
    value = sample(stack, tensor, index)
    if value is None:
        raise BundleRejected(
            Reason.MANIFEST_INVALID,
            f"golden {side}:{tensor.name} is {stack.dtype} {list(stack.shape)}; sample {index} does not fit "
            f"{describe(tensor)}",
            _REBUILD,
        )
    return value


_REBUILD = "build the bundle again with edge-optimize and publish it anew"
