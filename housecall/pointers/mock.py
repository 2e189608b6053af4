"""`MockDataset`: made-up records in the place of an owner's, for programs to be written on before they meet real ones.

What must live here: a mock as a scientist holds it, and what she does where there is none. It is a value of this
process and of no worker: what is computed from it is hers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import TensorDataset

from ..errors import ProtocolError, UsageError
from ..program.typing import DTYPES
from ..wire.messages import Mocked, Owned

__all__ = ["MockDataset", "by_hand", "mock_of"]


class MockDataset(TensorDataset):
    """The mock of an owned data set: columns of made-up records, here. Nothing in it is real.

    Its records, and so the batches of torch's `DataLoader`, or of a `FederatedDataLoader` over `mock.federate((a, b))`,
    have the structure of the real ones: a tensor for each column, or the tensor itself if there is one column.
    `tensors` are the columns in order, `name` and `worker` say whose mock it is."""

    def __init__(self, name: str, worker: str, columns: dict[str, torch.Tensor]) -> None:
        super().__init__(*columns.values())
        self.name, self.worker, self.columns = name, worker, tuple(columns)

    def column(self, name: str) -> torch.Tensor:
        """A whole column, (records, ...)."""
        try:
            return self.tensors[self.columns.index(name)]
        except ValueError:
            raise UsageError(f"the mock of '{self.name}' has no column {name!r}; it has {self._names()}") from None

    def __getitem__(self, index: Any) -> Any:
        record = tuple(column[index] for column in self.tensors)
        return record if len(record) > 1 else record[0]

    def __repr__(self) -> str:
        columns = ", ".join(
            f"{name}: {str(column.dtype).removeprefix('torch.')}{list(column.shape[1:])}"
            for name, column in zip(self.columns, self.tensors, strict=True)
        )
        return f"<mock of '{self.name}' at {self.worker}: {len(self):,} records of {columns}; none of them is real>"

    def _names(self) -> str:
        return ", ".join(self.columns)


def mock_of(owned: Owned, worker: str, mocked: Mocked) -> MockDataset:
    """What came as the mock of a data set. Raises `ProtocolError` if it has not its schema."""
    tensors: Sequence[torch.Tensor] = [array.data for array in mocked.columns]
    found = [(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape[1:])) for tensor in tensors if tensor.dim()]
    expected = [(column.dtype, column.shape) for column in owned.columns]
    if found != expected or len({len(tensor) for tensor in tensors}) != 1:
        raise ProtocolError(
            f"worker '{worker}' gave a mock of '{owned.name}' that has not its schema: {found}. If the data set was "
            "replaced since it was found, look it up anew"
        )
    return MockDataset(owned.name, worker, {of.name: one for of, one in zip(owned.columns, tensors, strict=True)})


def by_hand(owned: Owned) -> str:
    """Python that makes up records of a schema: a beginning for whoever is given none."""
    columns = ", ".join(_made_up((100, *column.shape), column.dtype) for column in owned.columns)
    return f"torch.utils.data.TensorDataset({columns})"


def _made_up(shape: tuple[int, ...], dtype: str) -> str:
    kind, size = DTYPES[dtype], f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
    given = "" if dtype in ("float32", "int64") else f", dtype=torch.{dtype}"
    if dtype == "bool":
        return f"torch.rand({size}) < 0.5"
    if dtype.startswith("float8") or dtype in ("complex32", "uint16", "uint32", "uint64"):  # torch draws none of these
        return f"torch.zeros({size}{given})"
    if kind.is_floating_point or kind.is_complex:
        return f"torch.randn({size}{given})"
    return f"torch.randint(0, 2, {size}{given})"
