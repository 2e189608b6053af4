"""`.csv`: comma-separated values with a header row (RFC 4180), in UTF-8."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from ...errors import DataError
from .cells import Cells, LabelCells, NumberCells, is_number
from .records import Records, Request

__all__ = ["read_csv"]


def read_csv(path: Path, request: Request) -> Records:
    """Each column of the file is a column of numbers, or of class numbers if the request calls it a label.

    `DataError` names the row (the header is row 1) of what is ragged, text or missing."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        header = _header(next(rows, []), path)
        cells: dict[int, Cells] = {
            index: _cells(f"{path}: column '{name}'", name, request)
            for index, name in enumerate(header)
            if request.wants(name)
        }
        blank = 0
        for number, row in enumerate(rows, start=2):
            if not row:  # blank lines may end a file; elsewhere they are a row that lost its values
                blank = blank or number
                continue
            if blank or len(row) != len(header):
                found = f"row {blank} is blank" if blank else f"row {number} has {len(row)} cell(s)"
                raise DataError(f"{path}: {found}, but its header has {len(header)}")
            for index, column in cells.items():
                column.add(row[index].strip(), number)
    return Records(
        {header[index]: column.tensor() for index, column in cells.items()},
        {header[index]: column.classes() for index, column in cells.items() if header[index] in request.labels},
        left_out=tuple(name for name in header if not request.wants(name)),
    )


def _cells(place: str, name: str, request: Request) -> Cells:
    return LabelCells(place) if name in request.labels else NumberCells(place, name, request.missing)


def _header(row: Sequence[str], path: Path) -> list[str]:
    """The names of the columns. `DataError` if the first row is no header."""
    names = [name.strip() for name in row]
    if not names:
        raise DataError(f"{path} is empty: a header row and at least one record are needed")
    if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
        raise DataError(f"{path} seems to be separated by something else than commas: '{names[0][:60]}'")
    if any(is_number(name) for name in names):
        raise DataError(f"{path} starts with numbers: its first row must be a header that names the columns")
    for index, name in enumerate(names):
        if not name:
            raise DataError(f"{path}: column {index + 1} has no name in the header row")
        if name in names[:index]:
            raise DataError(f"{path}: two columns are called '{name}'")
    return names
