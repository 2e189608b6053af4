"""`.npz`: numpy's archive of arrays. Nothing is unpickled, and nothing is allocated that the file cannot fill."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO

import torch
from numpy.lib import format as npy

from ...errors import DataError
from .records import Records, Request, check_dtype, from_numpy, promised_bytes

__all__ = ["DEFLATE_RATIO", "read_npz"]

# No deflate stream is longer than this times its compressed bytes (zlib's technical notes, "maximum expansion").
DEFLATE_RATIO = 1032
_METHODS = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: DEFLATE_RATIO}
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_npz(path: Path, request: Request) -> Records:
    """Each array is a column of its own name. `DataError` for a file that is damaged, lies, or holds objects."""
    records = Records()
    left_out = []
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        for member in members:
            name = member.filename.removesuffix(".npy")
            if not member.filename.endswith(".npy"):
                raise DataError(f"{path} holds '{member.filename}', which is no array (.npy)")
            if name in records.columns or name in left_out:
                raise DataError(f"{path} holds '{member.filename}' twice")
            if request.wants(name):
                records.columns[name] = _array(archive, member, f"{path}: '{name}'")
            else:
                left_out.append(name)
    records.left_out = tuple(left_out)
    return records


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, place: str) -> torch.Tensor:
    with archive.open(member) as file:
        _check_size(_promised(file, place), member, place)
    # The header told the truth about sizes, so numpy may allocate what it says. It reads to the member's last byte,
    # where the archive's checksum is compared.
    with archive.open(member) as file:
        return from_numpy(npy.read_array(file, allow_pickle=False), place)


def _promised(file: IO[bytes], place: str) -> int:
    """The bytes that the header of an array promises, its own included."""
    version = npy.read_magic(file)
    if version not in _HEADERS:
        raise DataError(f"{place} has a header of version {version}, expected 1.0 or 2.0")
    shape, _, dtype = _HEADERS[version](file)
    check_dtype(dtype, place)
    return file.tell() + promised_bytes(shape, dtype.itemsize, place)


def _check_size(promised: int, member: zipfile.ZipInfo, place: str) -> None:
    """The header, the archive's index and the compressed bytes must be able to be of one array."""
    if promised != member.file_size:
        raise DataError(f"{place} promises {promised:,} bytes, but the archive says it has {member.file_size:,}")
    ratio = _METHODS.get(member.compress_type)
    if ratio is None:
        raise DataError(f"{place} is compressed with method {member.compress_type}, expected none or deflate")
    if promised > ratio * member.compress_size:
        raise DataError(
            f"{place} promises {promised:,} bytes, more than its {member.compress_size:,} in the archive could hold"
        )
