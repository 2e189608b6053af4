"""What a worker's owner registered there, as a scientist holds it: a schema, and pointers to columns she never saw."""

from __future__ import annotations

import math
from typing import Any

from torch.utils._pytree import tree_flatten

from ..errors import UsageError
from ..program.outcome import spec
from ..types import TensorType
from ..wire.messages import Column, Load, Owned
from .calls import point
from .data import FederatedDataset, Part
from .session import Slot
from .tensor import PointerTensor

__all__ = ["OwnedDataset"]


class OwnedDataset(FederatedDataset):
    """A data set that a worker's owner registered there. It never was here: `FederatedDataLoader` gives pointers to its
    batches, and `a.dataset("heart") + b.dataset("heart")` joins what several owners have.

    `name`, `tags`, `description`, `count` and `columns` (name -> dtype and shape of one record) say what it is."""

    def __init__(self, location: Any, owned: Owned) -> None:
        slots = [Slot(location.session, spec(_whole(owned.count, column))) for column in owned.columns]
        location.session.tell(Load(owned.name, tuple(slot.id for slot in slots)))
        location.session.guarded = True
        columns = [point(PointerTensor, slot) for slot in slots]
        _, structure = tree_flatten(tuple(columns) if len(columns) > 1 else columns[0])
        super().__init__([Part(location, columns, structure)])
        self.name, self.tags, self.description, self.count = owned.name, owned.tags, owned.description, owned.count
        self.columns = {column.name: f"{column.dtype}{list(column.shape)}" for column in owned.columns}

    @property
    def location(self) -> Any:
        """The worker that holds it."""
        return self.parts[0].location

    def column(self, name: str) -> PointerTensor:
        """A pointer to a whole column, (records, ...)."""
        try:
            return self.parts[0].columns[list(self.columns).index(name)]
        except ValueError:
            raise UsageError(f"'{self.name}' has no column {name!r}; it has {', '.join(self.columns)}") from None

    def __repr__(self) -> str:
        columns = ", ".join(f"{name}: {kind}" for name, kind in self.columns.items())
        tags = f" {' '.join(self.tags)}" if self.tags else ""
        return f"<dataset '{self.name}' at {self.location.id}: {self.count:,} records of {columns}{tags}>"


def _whole(count: int, column: Column) -> TensorType:
    """The type of a column: contiguous, (records, ...)."""
    shape = (count, *column.shape)
    stride = tuple(math.prod(shape[dim + 1 :]) if 0 not in shape else 1 for dim in range(len(shape)))
    return TensorType(column.dtype, shape, stride)
