"""Cells of a column of a table, collected one by one: numbers, or values whose classes are numbered.

What must live here: what a text may mean as a number, what counts as missing, how classes are numbered. What must
not: any file format. The rules are few and strict, since a cell that is misread is never noticed again.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from ...errors import DataError

__all__ = ["Cells", "LabelCells", "NumberCells", "is_number", "missing_error"]

# What stands for no value: the empty cell, and what R, pandas, SQL, Weka and the UCI repository write for it.
MISSING = {"", "?", "na", "n/a", "nan", "null", "none"}

_INTEGER = re.compile(r"[+-]?[0-9]+")
_CODE = re.compile(r"0[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")  # 007: a number would lose the zeros; no code has a sign
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?inf(inity)?", re.IGNORECASE)
_EXACT = 2**53  # beyond it float64 does not hold every integer
_SHOWN = 5


def is_number(text: str) -> bool:
    """Whether a cell is a number as this file reads them."""
    return bool(_FLOAT.fullmatch(text))


def missing_error(place: str, rows: Sequence[int]) -> DataError:
    """The error for missing values in these rows."""
    return DataError(
        f"{place} misses a value in {_rows(rows)}: fill or remove these rows, leave the column out with --columns, or "
        "pass --missing nan"
    )


def _rows(rows: Sequence[int]) -> str:
    more = f" and {len(rows) - _SHOWN:,} more" if len(rows) > _SHOWN else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:_SHOWN]))}{more}"


class Cells(Protocol):
    """Collects the cells of one column, in order."""

    def add(self, text: str, row: int) -> None:
        """Take the cell of a row (rows count from 1, the header's). DataError if it does not fit."""

    def tensor(self) -> torch.Tensor:
        """All of them: (n,)."""

    def classes(self) -> tuple[str, ...]:
        """The values whose positions the tensor holds; none where the cells are numbers themselves."""


class NumberCells:
    """int64 as long as every cell is an integer, float64 from the first one that is not."""

    def __init__(self, place: str, name: str, missing: str) -> None:
        self.place, self.name, self.missing = place, name, missing
        self.values: array[int] | array[float] = array("q")
        self.missing_rows: list[int] = []

    def add(self, text: str, row: int) -> None:
        """Take one cell. DataError for text, for digits that are a code rather than a number, and for an integer that
        int64 does not hold."""
        if _CODE.fullmatch(text):
            raise DataError(
                f"{self.place} holds '{text[:40]}' in row {row}, whose leading zeros a number does not keep: a code "
                f"(a postcode, an id) is numbered with --label '{self.name}', or left out with --columns; if they are "
                "numbers, write them without the zeros"
            )
        if _INTEGER.fullmatch(text):
            self._add_integer(int(text), row)
        elif _FLOAT.fullmatch(text):
            self._floats(row).append(float(text))
        elif text.lower() in MISSING:
            self.missing_rows.append(row)
            if self.missing == "nan":
                self._floats(row).append(float("nan"))
        else:
            raise DataError(
                f"{self.place} holds text ('{text[:40]}' in row {row}): number its values with "
                f"--label '{self.name}', or leave the column out with --columns"
            )

    def _add_integer(self, value: int, row: int) -> None:
        if self.values.typecode == "d":
            self._check_exact(value, row)
        elif not -(2**63) <= value < 2**63:
            raise DataError(f"{self.place} holds an integer in row {row} that int64 does not hold")
        self.values.append(value)

    def _floats(self, row: int) -> array[float]:
        if self.values.typecode == "q":
            for value in self.values:
                self._check_exact(int(value), row)
            self.values = array("d", self.values)
        return self.values  # type: ignore[return-value]  # the typecode is "d" now

    def _check_exact(self, value: int, row: int) -> None:
        if abs(value) > _EXACT:
            raise DataError(
                f"{self.place} mixes integers beyond 2^53 with decimals or missing values (row {row}): no one dtype "
                "holds both exactly"
            )

    def tensor(self) -> torch.Tensor:
        """int64 or float64 (n,). DataError if values miss and that was not allowed."""
        if self.missing_rows and self.missing != "nan":
            raise missing_error(self.place, self.missing_rows)
        dtype = np.int64 if self.values.typecode == "q" else np.float64
        return torch.from_numpy(np.array(self.values, dtype=dtype))

    def classes(self) -> tuple[str, ...]:
        """None: the numbers mean themselves."""
        return ()


class LabelCells:
    """Distinct values, sorted (as integers where all are), become 0, 1, 2 ...: int64."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.met: dict[str, int] = {}
        self.codes = array("q")
        self.missing_rows: list[int] = []

    def add(self, text: str, row: int) -> None:
        """Take one cell."""
        if text.lower() in MISSING:
            self.missing_rows.append(row)
        else:
            self.codes.append(self.met.setdefault(text, len(self.met)))

    def tensor(self) -> torch.Tensor:
        """int64 (n,): positions in `classes()`. DataError for missing values: no class stands for them."""
        if self.missing_rows:
            raise DataError(f"{self.place} misses a label in {_rows(self.missing_rows)}: fill or remove these rows")
        position = {value: index for index, value in enumerate(self.classes())}
        order = np.array([position[value] for value in self.met], dtype=np.int64)
        return torch.from_numpy(order[np.array(self.codes, dtype=np.int64)])

    def classes(self) -> tuple[str, ...]:
        """The distinct values in the order of their numbers."""
        if all(_INTEGER.fullmatch(value) for value in self.met):
            return tuple(sorted(self.met, key=lambda value: (int(value), value)))
        return tuple(sorted(self.met))
