"""From an owner's files to the columns of one data set: the closed table of readers, and how their columns join.

What must live here: which reader a name gets, and every rule about columns that come together: same counts, no
two of one name, grouping, conversion. What must not: any format. Where a rule does not decide, it is an error that
says what to add: a data set is registered once and trained on for years.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from ...errors import DataError, HousecallError, UsageError
from ...program.typing import DTYPES
from ...wire.codec import ITEM_BYTES
from .csv import read_csv
from .idx import idx_column, read_idx
from .images import read_images
from .npz import read_npz
from .parquet import read_parquet
from .records import Records, Request, Source
from .tensors import read_safetensors

__all__ = ["SUFFIXES", "converted", "read"]

Reader = Callable[[Path, Request], Records]

# The closed table. Besides: names such as `train-images-idx3-ubyte.gz` (idx), and folders (images).
SUFFIXES: dict[str, Reader] = {
    ".csv": read_csv,
    ".npz": read_npz,
    ".parquet": read_parquet,
    ".safetensors": read_safetensors,
}
_TABLES = (read_csv, read_parquet)  # the readers that know labels and missing values


def read(files: Iterable[Source], request: Request | None = None) -> Records:
    """The columns of all these files, which hold the same records.

    `DataError` for a file that is missing, damaged or unfit, and where columns collide or counts differ;
    `UsageError` for a request that names what is not there, or that no file can follow."""
    request = request or Request()
    paths = [Path(file) for file in files]
    if not paths:
        raise UsageError("no file was named")
    readers = [_reader(path) for path in paths]
    _check_request(request, readers)
    found: dict[str, Path] = {}
    joined = Records()
    left_out: list[str] = []
    for path, reader in zip(paths, readers, strict=True):
        records = _read(path, reader, request)
        for name, column in records.columns.items():
            _check_joins(name, column, path, joined, found)
            joined.columns[name] = column
            found[name] = path
        joined.classes.update(records.classes)
        left_out.extend(records.left_out)
    joined.left_out = tuple(left_out)
    for name in request.labels:
        _check_known(name, "--label", joined.columns, left_out)
        if name not in joined.classes:
            raise UsageError(f"--label {name}: {found[name]} gives numbers, labels are for columns of csv and parquet")
    return _converted(_grouped(joined, request), request)


def _reader(path: Path) -> Reader:
    if path.is_dir():
        return read_images
    if not path.is_file():
        raise DataError(f"there is no file or folder {path}")
    if idx_column(path) is not None:
        return read_idx
    reader = SUFFIXES.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path} is of no known kind: expected {', '.join(SUFFIXES)}, .idx, .idx.gz, a name such as "
            "train-images-idx3-ubyte.gz, or a folder of images"
        )
    return reader


def _check_request(request: Request, readers: list[Reader]) -> None:
    """An option that no file here can follow was meant for something else."""
    if request.size is not None and read_images not in readers:
        raise UsageError("--size is for folders of images, and there is none among the files")
    if request.size is not None and min(request.size) < 1:
        raise UsageError(f"--size {request.size[0]}x{request.size[1]} must be at least 1x1")
    if not any(reader in _TABLES for reader in readers) and (request.labels or request.missing != "refuse"):
        raise UsageError("--label and --missing are for csv and parquet, and there is none among the files")


def _read(path: Path, reader: Reader, request: Request) -> Records:
    try:
        return reader(path, request)
    except HousecallError:
        raise
    except Exception as error:  # a parser may raise anything for a damaged file; to the owner it is one mistake
        kind = "a folder of images" if reader is read_images else f"a {path.suffix or 'data'} file"
        raise DataError(f"{path} cannot be read as {kind}: {type(error).__name__}: {error}") from None


def _check_joins(name: str, column: torch.Tensor, path: Path, joined: Records, found: Mapping[str, Path]) -> None:
    if name in found:
        raise DataError(
            f"both {found[name]} and {path} have a column '{name}': files of one data set hold different columns of "
            "the same records; rename one, or add it as a data set of its own"
        )
    if column.dim() == 0:
        raise DataError(f"{path}: '{name}' is a single value, not one a record: leave it out with --columns")
    for other, known in joined.columns.items():
        if len(known) != len(column):
            raise DataError(
                f"{path}: column '{name}' has {len(column):,} records, but column '{other}' of {found[other]} has "
                f"{len(known):,}"
            )


def _check_known(name: str, option: str, columns: Mapping[str, torch.Tensor], left_out: Iterable[str]) -> None:
    if name in columns:
        return
    if name in left_out:
        raise UsageError(f"{option} {name}: the column is left out, since no --columns entry names it")
    known = ", ".join([*columns, *left_out]) or "none"
    raise UsageError(f"{option} {name}: no file has such a column; there are: {known}")


def _grouped(records: Records, request: Request) -> Records:
    """The columns that the request makes of those in the files; all of them, as they are, if it makes none."""
    if not request.columns:
        return records
    grouped = Records(left_out=records.left_out)
    for target, sources in request.columns.items():
        for name in sources:
            _check_known(name, f"--columns {target}=", records.columns, records.left_out)
        parts = [records.columns[name] for name in sources]
        if len(sources) == 1:
            grouped.columns[target] = parts[0]
        else:
            grouped.columns[target] = _stacked(target, sources, parts, request)
            grouped.sources[target] = sources
        for name in sources:
            if name in records.classes:
                grouped.classes[target if len(sources) == 1 else f"{target}.{name}"] = records.classes[name]
    return grouped


def _stacked(target: str, sources: tuple[str, ...], parts: list[torch.Tensor], request: Request) -> torch.Tensor:
    """Columns of one number a record side by side: (n, columns). Their common dtype must hold each exactly."""
    for name, part in zip(sources, parts, strict=True):
        if part.dim() != 1:
            raise UsageError(f"--columns {target}: '{name}' has {tuple(part.shape[1:])} a record, expected one number")
    if target in request.dtypes:
        parts = [converted(part, request.dtypes[target], name) for name, part in zip(sources, parts, strict=True)]
    try:
        common = functools.reduce(torch.promote_types, (part.dtype for part in parts))
        exact = all(_equal(part, _back(part.to(common), part.dtype)) for part in parts)
    except RuntimeError:  # torch has no common dtype for some, such as uint64 and int64
        exact = False
    if not exact:
        mixed = ", ".join(f"{name} {_name(part.dtype)}" for name, part in zip(sources, parts, strict=True))
        raise DataError(f"--columns {target} groups {mixed}, which no dtype holds exactly: choose --dtype {target}=...")
    return torch.stack([part.to(common) for part in parts], dim=1)


def _converted(records: Records, request: Request) -> Records:
    for name, dtype in request.dtypes.items():
        _check_known(name, "--dtype", records.columns, records.left_out)
        records.columns[name] = converted(records.columns[name], dtype, name)
    return records


def converted(column: torch.Tensor, dtype: str, name: str) -> torch.Tensor:
    """The column in another dtype. Floats may be rounded to a shorter float, since that was asked for; nothing else
    may change: `DataError`. `UsageError` for a dtype that does not exist or does not travel."""
    if dtype not in ITEM_BYTES:
        raise UsageError(f"--dtype {name}={dtype}: expected one of {', '.join(ITEM_BYTES)}")
    target = DTYPES[dtype]
    if target == column.dtype:
        return column
    if column.is_complex() and not target.is_complex:
        raise UsageError(f"--dtype {name}={dtype}: the column is complex, and would lose its imaginary part")
    result = column.to(target)
    if column.is_floating_point() and target.is_floating_point:  # rounding is what was asked for
        kept = torch.equal(column.double().isfinite(), result.double().isfinite())
    else:
        kept = _equal(column, _back(result, column.dtype))
    if not kept:
        raise DataError(f"--dtype {name}={dtype}: some of its {_name(column.dtype)} values do not fit")
    return result


def _back(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values in the dtype that they were converted from."""
    return (values.real if values.is_complex() and not dtype.is_complex else values).to(dtype)


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """The same values, NaN counted as equal to NaN."""
    if left.is_floating_point():
        left, right = left.double(), right.double()  # which holds every float exactly, and has every operator
        return bool(((left == right) | (left.isnan() & right.isnan())).all())
    return torch.equal(left, right)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
