"""`.parquet`: read with pyarrow, which is an extra. Extension types are not loaded: only plain numbers and text are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import DataError
from .cells import LabelCells, missing_error
from .records import Records, Request, from_numpy

__all__ = ["read_parquet"]


# Arrow's names of what numpy has too.
_KINDS = {
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "halffloat", "float", "double",
}  # fmt: skip


def read_parquet(path: Path, request: Request) -> Records:
    """Each column is a column: numbers and booleans as they are, lists of one fixed size as further dimensions, text
    only as a label. `DataError` if pyarrow is missing, and for anything else."""
    try:
        from pyarrow import parquet  # type: ignore[import-untyped]  # it has no stubs
    except ImportError:  # an extra: 100 MB that few workers need
        raise DataError(f"{path}: reading parquet needs pyarrow: pip install 'housecall[parquet]'") from None
    records = Records()
    with parquet.ParquetFile(path) as file:
        names = list(file.schema_arrow.names)
        for name in names:
            if names.count(name) > 1:
                raise DataError(f"{path}: two columns are called '{name}'")
            if not request.wants(name):
                continue
            column = file.read(columns=[name]).column(name)
            if len(column) != file.metadata.num_rows:
                raise DataError(
                    f"{path}: column '{name}' has {len(column):,} values, the file says {file.metadata.num_rows:,}"
                )
            _read(column, name, f"{path}: column '{name}'", request, records)
    records.left_out = tuple(name for name in names if name not in records.columns)
    return records


def _read(column: Any, name: str, place: str, request: Request, records: Records) -> None:
    kind = str(column.type)
    text = kind in ("string", "large_string", "string_view") or kind.startswith("dictionary<values=string")
    if name in request.labels:
        if not text and (kind not in _KINDS or kind in ("halffloat", "float", "double")):
            raise DataError(f"{place} holds {kind}, expected text, integers or booleans for a label")
        cells = LabelCells(place)
        for row, value in enumerate(column.to_pylist(), start=1):
            cells.add("" if value is None else str(value).strip(), row)
        records.columns[name], records.classes[name] = cells.tensor(), cells.classes()
    elif text:
        raise DataError(f"{place} holds text: number its values with --label '{name}', or leave it out with --columns")
    else:
        records.columns[name] = _numbers(column.combine_chunks(), place, request)


def _numbers(array: Any, place: str, request: Request) -> torch.Tensor:
    """The elements of an arrow array; its lists of fixed size, nested or not, as further dimensions."""
    shape = [len(array)]
    while str(array.type).startswith("fixed_size_list"):
        if array.null_count:
            raise DataError(f"{place} misses {array.null_count:,} whole list(s): fill or remove these rows")
        shape.append(array.type.list_size)
        array = array.flatten()
    kind = str(array.type)
    if kind not in _KINDS:
        raise DataError(
            f"{place} holds {kind}, expected numbers, booleans or lists of them of one fixed size: "
            f"{_advice(kind)}, or leave it out with --columns"
        )
    if array.null_count:
        array = _with_nan(array, shape, place, request)
    return from_numpy(array.to_numpy(zero_copy_only=False).reshape(shape), place)


def _advice(kind: str) -> str:
    """How a column of this type becomes one that is read."""
    if kind.startswith(("list", "large_list")):
        return "make its lists of one size (pyarrow's list_(type, size))"
    if kind.startswith(("date", "time", "duration")):
        return "store it as a number, such as days"
    if kind.startswith("decimal"):
        return "cast it to float64"
    return "convert it to one of these"


def _with_nan(array: Any, shape: list[int], place: str, request: Request) -> Any:
    """The array with NaN for what is missing, if that was asked for. Integers become float64, if they all can."""
    if request.missing != "nan":
        missing = array.is_null().to_numpy(zero_copy_only=False).reshape(shape[0], -1).any(axis=1)
        raise missing_error(place, (np.flatnonzero(missing) + 1).tolist())
    if str(array.type) not in ("halffloat", "float", "double"):
        array = array.cast("float64")  # safe: refuses what float64 does not hold exactly
    return array.fill_null(float("nan"))
