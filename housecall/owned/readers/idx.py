"""`.idx`: the format of MNIST (http://yann.lecun.com/exdb/mnist): a type, the dimensions, the elements, big-endian."""

from __future__ import annotations

import gzip
import re
import struct
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ...errors import DataError
from .npz import DEFLATE_RATIO
from .records import Records, Request, from_numpy, promised_bytes

__all__ = ["idx_column", "read_idx"]

# The closed table of the format's type codes.
_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_FILE = re.compile(r"(.+?)(?:\.idx|[-.]idx\d+-[a-z0-9]+)(\.gz)?", re.ASCII)


class _Bytes(Protocol):
    """What plain and gzipped files have in common."""

    def read(self, size: int, /) -> bytes: ...

    def readinto(self, buffer: Any, /) -> int: ...


def idx_column(path: Path) -> str | None:
    """The column that a file of this name holds: 'train-images' for `train-images-idx3-ubyte.gz`, 'x' for `x.idx`;
    `None` if the name is not an idx file's."""
    match = _FILE.fullmatch(path.name)
    return match[1] if match else None


def read_idx(path: Path, request: Request) -> Records:
    """The one column of an idx file, gzipped or not. `DataError` if it is damaged or promises what it has not."""
    name = idx_column(path) or path.name
    if not request.wants(name):
        return Records(left_out=(name,))
    size = path.stat().st_size
    if path.suffix == ".gz":
        with gzip.open(path, "rb") as file:
            return Records({name: _tensor(file, DEFLATE_RATIO * size, str(path))})
    with path.open("rb") as plain:
        return Records({name: _tensor(plain, size, str(path))})


def _tensor(file: _Bytes, room: int, place: str) -> torch.Tensor:
    """The elements behind the header; `room` is how many bytes the file has (at most, if it is compressed)."""
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _DTYPES:
        raise DataError(f"{place} starts with {magic.hex() or 'nothing'}, expected 0000, a type code and a rank")
    dimensions = magic[3]
    header = file.read(4 * dimensions)
    if len(header) < 4 * dimensions:
        raise DataError(f"{place} is cut short within its header")
    shape = struct.unpack(f">{dimensions}I", header)
    dtype = np.dtype(_DTYPES[magic[2]])
    promised = promised_bytes(shape, dtype.itemsize, place)
    expected = 4 + len(header) + promised
    if expected > room:
        sizes = " × ".join(map(str, shape))
        raise DataError(f"{place} promises {sizes} elements in {expected:,} bytes, but can hold {room:,} at most")
    elements = np.empty(shape, dtype)
    _fill(file, elements.reshape(-1).view(np.uint8).data, place)
    return from_numpy(elements, place)


def _fill(file: _Bytes, target: memoryview, place: str) -> None:
    """Read exactly as many bytes as `target` holds, and meet the end of the file (and its checksum) behind them."""
    at = 0
    while at < len(target):
        count = file.readinto(target[at:])
        if not count:
            raise DataError(f"{place} is cut short: {at:,} bytes of elements, expected {len(target):,}")
        at += count
    if file.read(1):
        raise DataError(f"{place} goes on after its last element: {len(target):,} bytes were promised")
