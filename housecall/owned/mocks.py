"""Mocks: records that an owner gives away beside a data set, so that programs are written before it is touched.

What must live here: what makes a mock fit for a data set, and how one is made up. What must not: files, and who asks.

NOTE [Never from the data]
A mock is for whoever finds the data set: no policy is asked. So what is made up here is made of the schema, which is
public, and of ranges, which its owner states; not of the least, the greatest, the classes or any element of the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import UsageError
from ..program.typing import DTYPES
from ..types import TensorType
from .description import plain, record_type

__all__ = ["Fakes", "Range", "fitted"]

Range = int | tuple[float, float]


class Fakes:
    """A mock to be made up: `Fakes(records=100, x=(0, 1), y=3)`.

    A column's range is (least, greatest), both included for whole numbers, or a number of classes: 3 is for 0, 1 and 2.
    It is public: say what you would say to anybody, not what you read off the data. Without one, floats are standard
    normal and truths are tossed coins; whole numbers need one. Those of columns whose names are no Python names, or
    taken here, go into `ranges`: `Fakes(100, {"seed": (0, 9)})`. The same `seed` makes the same records."""

    def __init__(
        self, records: int = 100, ranges: Mapping[str, Range] | None = None, *, seed: int = 0, **more: Range
    ) -> None:
        if isinstance(records, bool) or not isinstance(records, int) or records < 1:
            raise UsageError(f"a mock has at least one record; found records={records!r}")
        if not isinstance(ranges, Mapping | None) or isinstance(seed, bool) or not isinstance(seed, int):
            raise UsageError(
                "ranges= of Fakes are ranges by column, and seed= is a number; for columns of these names write "
                'Fakes(100, {"seed": (0, 9)})'
            )
        self.records, self.seed = records, seed
        self.ranges = {name: _checked(name, given) for name, given in {**(ranges or {}), **more}.items()}

    def __repr__(self) -> str:
        ranges = "".join(f", {name}={given}" for name, given in self.ranges.items())
        return f"Fakes(records={self.records}{ranges})"

    def columns(self, data_set: str, types: Mapping[str, TensorType]) -> dict[str, torch.Tensor]:
        """Made-up columns of these types, (records, ...) each. `UsageError` for a range that is missing or unfit."""
        unknown = [name for name in self.ranges if name not in types]
        if unknown:
            raise UsageError(f"a range is given for {', '.join(unknown)}, but '{data_set}' has {', '.join(types)}")
        generator = torch.Generator().manual_seed(self.seed)
        return {name: self._column(name, type_, generator) for name, type_ in types.items()}

    def _column(self, name: str, type_: TensorType, generator: torch.Generator) -> torch.Tensor:
        shape, dtype, given = (self.records, *type_.shape), DTYPES[type_.dtype], self.ranges.get(name)
        if dtype is torch.bool or dtype.is_complex:
            if given is not None:
                raise UsageError(f"column '{name}' is {type_.dtype}, which is made up without a range: leave it out")
            if dtype is torch.bool:
                return torch.rand(shape, generator=generator) < 0.5
            return torch.complex(*(torch.randn(shape, generator=generator) for _ in range(2))).to(dtype)
        if dtype.is_floating_point:
            return _floats(shape, given, generator).to(dtype)
        if given is None:
            raise UsageError(
                f"column '{name}' is {type_.dtype}, and nothing public says which whole numbers it may hold: give a "
                f"range, such as {name}=(0, 9) or --range {name}=0:9"
            )
        return _whole_numbers(name, shape, dtype, given, generator)


def _checked(name: str, given: Any) -> Range:
    if isinstance(given, int) and not isinstance(given, bool) and given >= 1:
        return given
    if isinstance(given, tuple | list) and len(given) == 2:
        least, greatest = given
        numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in given)
        if numbers and math.isfinite(least) and math.isfinite(greatest) and least <= greatest:
            return least, greatest
    raise UsageError(
        f"the range of column '{name}' is (least, greatest), or a number of classes from 1 on; found {given!r}"
    )


def _floats(shape: tuple[int, ...], given: Range | None, generator: torch.Generator) -> torch.Tensor:
    if given is None:
        return torch.randn(shape, generator=generator)
    least, greatest = _ends(given)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * (greatest - least) + least


def _whole_numbers(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, given: Range, generator: torch.Generator
) -> torch.Tensor:
    least, greatest = _ends(given)
    kind = torch.iinfo(dtype)
    highest = min(kind.max, torch.iinfo(torch.int64).max - 1)
    if least != int(least) or greatest != int(greatest) or least < kind.min or greatest > highest:
        raise UsageError(
            f"the range of column '{name}' is of whole numbers from {kind.min} to {highest}; found {given!r}"
        )
    return torch.randint(int(least), int(greatest) + 1, shape, generator=generator).to(dtype)


def _ends(given: Range) -> tuple[float, float]:
    return (0, given - 1) if isinstance(given, int) else given


# -- what fits ------------------------------------------------------------------------------------------------


def fitted(
    name: str, types: Mapping[str, TensorType], data: Mapping[str, torch.Tensor], mock: Any
) -> dict[str, torch.Tensor]:
    """The columns of a mock for data set `name`, in the order of its schema, in memory of their own; none for `None`.

    `types` are those of the columns that are lent, `data` all columns. `UsageError` for a column that is missing, too
    many, or of another type, and for a mock that *is* the data."""
    if mock is None:
        return {}
    if isinstance(mock, Fakes):
        return mock.columns(name, types)
    if not isinstance(mock, Mapping):
        raise UsageError(
            f"mock= of data set '{name}' is a {type(mock).__name__}: expected columns such as {{'x': tensor}}, or "
            "housecall.Fakes(records=100, ...)"
        )
    found = {column: plain(column, tensor) for column, tensor in mock.items()}
    _check_columns(name, types, found)
    _check_apart(name, data, found)
    return {column: found[column].cpu().clone(memory_format=torch.contiguous_format) for column in types}


def _check_columns(name: str, types: Mapping[str, TensorType], found: Mapping[str, torch.Tensor]) -> None:
    if set(found) != set(types):
        raise UsageError(
            f"the mock of data set '{name}' has columns {', '.join(found) or 'none'}; expected those that the data "
            f"set offers: {', '.join(types)}"
        )
    for column, tensor in found.items():
        if record_type(tensor) != types[column]:
            raise UsageError(
                f"column '{column}' of the mock of '{name}' holds {record_type(tensor)} a record, the data's holds "
                f"{types[column]}: make them alike"
            )
    counts = {column: len(tensor) for column, tensor in found.items()}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        said = ", ".join(f"'{column}' has {count:,}" for column, count in counts.items())
        raise UsageError(f"the columns of the mock of '{name}' have as many records each, at least one; found {said}")


def _check_apart(name: str, data: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    """Whoever passes the data for its mock, or a part of it, has made a mistake that nothing undoes."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in data.values()}
    shared = [column for column, tensor in found.items() if tensor.untyped_storage().data_ptr() in storages]
    same = [column for column, tensor in found.items() if _same(tensor, data[column])]
    if shared or same:
        one = (
            f"column '{shared[0]}' of it is a view of the data" if shared else f"column '{same[0]}' of it is the data's"
        )
        what = "it is the data itself" if len(same) == len(found) and not shared else one
        raise UsageError(
            f"the mock of data set '{name}' would give away real records: {what}. Whoever finds the data set has its "
            "mock, whatever the policy says: make records up, for instance with housecall.Fakes(...)"
        )


def _same(some: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether the bits are the same."""
    if some.shape != others.shape:
        return False
    bits = [tensor.cpu().contiguous().unsqueeze(-1).view(torch.uint8) for tensor in (some, others)]
    return torch.equal(*bits)
