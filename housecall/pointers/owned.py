"""What a worker's owner registered there, as a scientist holds it: a schema, and pointers to columns she never saw."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.utils._pytree import tree_flatten

from ..errors import DataError, UsageError
from ..program.outcome import spec
from ..types import TensorType
from ..wire.messages import Column, Load, Mock, Mocked, Owned
from .calls import point
from .data import FederatedDataset, Part
from .evaluation import Scored, ask_score, submit_score
from .mock import MockDataset, by_hand, mock_of
from .request import OwnersAnswer
from .slot import Slot
from .statistics import Asked, StatisticsAnswer, ask_statistics
from .tensor import PointerTensor

__all__ = ["OwnedDataset"]


class OwnedDataset(FederatedDataset):
    """A data set that a worker's owner registered there. It never was here: `FederatedDataLoader` gives pointers to its
    batches, and `a.dataset("heart") + b.dataset("heart")` joins what several owners have. The owner's policy is asked
    when a column is first used, not before: to look around is free.

    `name`, `tags`, `description`, `count` and `columns` (name -> dtype and shape of one record) say what it is; `unit`
    says what its owner protects, a "record" or a "person"; `mock()` gives made-up records."""

    def __init__(self, location: Any, owned: Owned) -> None:
        super().__init__([_Lent(location, owned)])
        self._owned = owned
        self.name, self.tags, self.description, self.count = owned.name, owned.tags, owned.description, owned.count
        self.unit = owned.unit
        self.columns = {column.name: f"{column.dtype}{list(column.shape)}" for column in owned.columns}

    @property
    def location(self) -> Any:
        """The worker that holds it."""
        return self.parts[0].location

    def column(self, name: str) -> PointerTensor:
        """A pointer to a whole column, (records, ...)."""
        if name not in self.columns:
            raise UsageError(f"'{self.name}' has no column {name!r}; it has {', '.join(self.columns)}")
        return self.parts[0].columns[list(self.columns).index(name)]

    def mock(self) -> MockDataset:
        """Made-up records of the same schema, here, to write programs on: no policy is asked, and nothing of the data
        is touched. Raises `DataError` if the owner gives none, with what to do instead."""
        if not self._owned.mock:
            schema = ", ".join(f"{name}: {kind}" for name, kind in self.columns.items())
            raise DataError(
                f"the owner of data set '{self.name}' at '{self.location.id}' gives no mock of it. Its records are "
                f"{schema}; make some up: {by_hand(self._owned)}"
            )
        found = self.location.session.ask(Mock(self.name))
        assert isinstance(found, Mocked)
        return mock_of(self._owned, self.location.id, found)

    def statistics(self, asked: Asked, *, epsilon: float) -> StatisticsAnswer:
        """A statistic that the owner's own code makes of the data, with noise that hides each record, or person:
        `statistics(Mean("age", 0, 120), epsilon=0.5)`. The same question costs epsilon each time that it is asked, of a
        budget that all who ask share. Raises `PolicyError` if the owner's rules, or what is left of it, say no."""
        return ask_statistics(self.location.session, self.name, asked, epsilon)

    def evaluate(
        self, score: Callable[..., Any], *inputs: Any, bounds: tuple[float, float], **named: Any
    ) -> StatisticsAnswer:
        """The mean over all records of a score of one record, made by the owner's own loop, with the noise that her
        policy asks for: `evaluate(loss, model, "x", "y", bounds=(0, 5))`. `score` is a function, or recorded; where it
        takes a column, give the column's name: it is called with one record, (1, ...), and returns one number, which is
        clamped to `bounds`. Modules and tensors among `inputs` are yours, here or at the worker.

        Raises `UsageError` for what is no score, `PolicyError` if the owner's rules, or what is left of the budget, say
        no."""
        return ask_score(self.location.session, self._owned, Scored(score, inputs, named, bounds))

    def submit(
        self,
        score: Callable[..., Any],
        *inputs: Any,
        bounds: tuple[float, float],
        reason: str,
        runs: int = 1,
        **named: Any,
    ) -> OwnersAnswer:
        """Ask the owner to let `evaluate` with the same arguments be made, `runs` times, where her policy asks for no
        noise: she reads the program. Raises as `evaluate` does."""
        return submit_score(self.location.session, self._owned, Scored(score, inputs, named, bounds), reason, runs)

    def __repr__(self) -> str:
        columns = ", ".join(f"{name}: {kind}" for name, kind in self.columns.items())
        tags = f" {' '.join(self.tags)}" if self.tags else ""
        of = " (person)" if self.unit == "person" else ""
        mock = f", mock of {self._owned.mock:,}" if self._owned.mock else ""
        return f"<dataset '{self.name}'{of} at {self.location.id}: {self.count:,} records of {columns}{tags}{mock}>"


class _Lent(Part):
    """The part at an owner's worker: its columns are asked for when one is first used."""

    def __init__(self, location: Any, owned: Owned) -> None:
        names = tuple(column.name for column in owned.columns)
        _, self.structure = tree_flatten(names if len(names) > 1 else names[0])
        self.location, self._owned = location, owned
        self._columns: list[PointerTensor] = []

    @property
    def columns(self) -> list[PointerTensor]:
        """Pointers to the columns: the first time, the owner's policy is asked for them."""
        if not self._columns:
            session = self.location.session
            with session.lock:
                if not self._columns:
                    self._columns = self._load(session)
        return self._columns

    def _load(self, session: Any) -> list[PointerTensor]:
        owned = self._owned
        slots = [Slot(session, spec(_whole(owned.count, column))) for column in owned.columns]
        session.tell(Load(owned.name, tuple(slot.id for slot in slots), owned.count, owned.columns))
        session.guarded = True
        return [point(PointerTensor, slot) for slot in slots]

    def __len__(self) -> int:
        return self._owned.count


def _whole(count: int, column: Column) -> TensorType:
    """The type of a column: contiguous, (records, ...)."""
    shape = (count, *column.shape)
    stride = tuple(math.prod(shape[dim + 1 :]) if 0 not in shape else 1 for dim in range(len(shape)))
    return TensorType(column.dtype, shape, stride)
