"""`Records`: named columns of equally many records, and `Request`: what the owner said about how to read them.

What must live here: what every reader takes and gives. What must not: any format.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from ...errors import DataError

__all__ = ["Progress", "Records", "Request", "Source", "check_dtype", "from_numpy", "promised_bytes"]

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]  # (items, what they are, how many) -> the same items
Source = str | os.PathLike[str]

# numpy's kinds of element that torch has, by kind and item size; the rest (text, dates, objects, records) is refused.
_TORCH_HAS = {
    *(("b", 1), ("f", 2), ("f", 4), ("f", 8), ("c", 8), ("c", 16)),
    *((kind, size) for kind in "iu" for size in (1, 2, 4, 8)),
}


def _silent(items: Iterable[Any], what: str, count: int) -> Iterable[Any]:
    return items


@dataclass(frozen=True)
class Request:
    """How files are to be read. What is empty was not said.

    `columns`: name -> the columns in the files that it is made of, in order; columns that no entry uses are left out.
    `labels`: text columns whose distinct values become class numbers. `missing`: "nan" turns a missing number into
    NaN, "refuse" is an error. `size`: (height, width) in pixels to which every image is scaled. `dtypes`: name ->
    torch's name of the dtype that the column is converted to.
    """

    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    missing: Literal["refuse", "nan"] = "refuse"
    size: tuple[int, int] | None = None
    dtypes: Mapping[str, str] = field(default_factory=dict)
    progress: Progress = _silent

    def wants(self, source: str) -> bool:
        """Whether a column of a file is to be read."""
        return not self.columns or any(source in sources for sources in self.columns.values())


@dataclass
class Records:
    """Columns with one record a row along dimension 0, all of the same count.

    `classes`: column -> the values whose positions its integers are. `sources`: column -> the columns of the files
    that it was grouped from, in the order of dimension 1. `left_out`: columns of the files that were not read.
    """

    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def from_numpy(array: np.ndarray[Any, Any], place: str) -> torch.Tensor:
    """A numpy array as a contiguous tensor, its bytes in this machine's order. `DataError` for what torch has not."""
    check_dtype(array.dtype, place)
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.require(native, requirements=["C", "W"]))


def check_dtype(dtype: np.dtype[Any], place: str) -> None:
    """`DataError` for elements that are not numbers which torch has: objects above all, which would be pickles."""
    if dtype.hasobject:
        raise DataError(f"{place} holds Python objects, which are never unpickled: store numbers")
    if (dtype.kind, dtype.itemsize) not in _TORCH_HAS or dtype.subdtype or dtype.names:
        raise DataError(
            f"{place} holds {dtype}, expected booleans, integers, floats or complex numbers: convert it, or name the "
            "columns that you want with --columns"
        )


def promised_bytes(shape: Iterable[int], item_bytes: int, place: str) -> int:
    """The bytes that a header promises, counted without overflow. `DataError` for a shape that is none."""
    count = item_bytes
    dimensions = tuple(shape)
    if len(dimensions) > 32 or any(n < 0 for n in dimensions):
        raise DataError(f"{place} has a header with shape {dimensions}, which no array has")
    for n in dimensions:
        count *= n
    return count
