"""Federated data: a data set whose records lie at workers, and a loader whose batches never mix owners.

A loader draws one permutation for each worker and epoch; with each batch go the numbers of its records, and the batch
is an `index_select` for each column. Without a permutation it is a copy of its records, as torch's own loader makes
one: a batch may be changed in place, the data set stays what it was. All of it is pointer operations: nothing waits,
and no record travels.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate

from ..errors import DataError, UsageError
from .phrase import say
from .session import Session
from .site import Site, caller
from .slot import Slot
from .tensor import PointerTensor, send, session_of

__all__ = ["FederatedDataLoader", "FederatedDataset", "Part", "federate"]

AHEAD = 32  # batches whose records' numbers are sent at once
_split_copy: Any = torch.split_copy  # its stub says that it returns nothing
CHUNK = 256  # records collated at once while a data set is read: bounds the memory beside the data itself


class Part:
    """What one worker holds: `columns`, in the structure of a sample."""

    def __init__(self, location: Any, columns: list[PointerTensor], structure: Any) -> None:
        lengths = {len(column) for column in columns}
        if len(lengths) != 1:
            raise DataError(
                f"the columns at '{location.id}' have {sorted(lengths)} records; they must have as many each"
            )
        self.location = location
        self.structure = structure
        self._columns = columns

    @property
    def columns(self) -> list[PointerTensor]:
        """Pointers, (records, ...) each."""
        return self._columns

    @functools.cached_property
    def assembled(self) -> Callable[[list[Any]], Any]:
        """What makes a sample of its columns."""
        return _assembled(self.structure)

    def __len__(self) -> int:
        return len(self.columns[0])


class FederatedDataset:
    """Records that lie at workers: one `Part` each."""

    def __init__(self, parts: Sequence[Part]) -> None:
        if not parts:
            raise DataError("a federated data set needs at least one worker")
        self.parts = tuple(parts)

    @property
    def workers(self) -> list[Any]:
        """The workers, in the order of the parts."""
        return [part.location for part in self.parts]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, location: Any) -> Part:
        """The part at a worker, given the worker or its id."""
        for part in self.parts:
            if location is part.location or location == part.location.id:
                return part
        held = ", ".join(part.location.id for part in self.parts)
        raise KeyError(f"no part at {getattr(location, 'id', location)!r}; there are parts at: {held}")

    def __add__(self, other: FederatedDataset) -> FederatedDataset:
        """The records of both, each where it lies."""
        return FederatedDataset((*self.parts, *other.parts))

    def __repr__(self) -> str:
        parts = ", ".join(f"{part.location.id}: {len(part):,}" for part in self.parts)
        return f"FederatedDataset({len(self):,} records; {parts})"


class FederatedDataLoader:
    """Batches of pointers, worker after worker; the last batch of a worker may be smaller, none mixes two.

    `shuffle` permutes within each worker. As with torch's own loader the order follows `torch.manual_seed`, or
    `generator` if one is given. `interleave` takes the workers in turn instead, a batch each. `len` counts
    batches; `.dataset` is the federated data set. Options of torch's loader that have no meaning here
    (`num_workers`, `pin_memory`, ...) are errors, not silently dropped.
    """

    def __init__(
        self,
        dataset: FederatedDataset | Sequence[FederatedDataset],
        batch_size: int = 8,
        shuffle: bool = False,
        drop_last: bool = False,
        *,
        interleave: bool = False,
        generator: torch.Generator | None = None,
        **others: Any,
    ) -> None:
        if others:
            raise UsageError(
                f"FederatedDataLoader has no option {', '.join(sorted(others))}: batches are made at the workers. "
                "Its options are batch_size, shuffle, drop_last, interleave and generator"
            )
        if isinstance(dataset, list | tuple) and dataset and all(isinstance(one, FederatedDataset) for one in dataset):
            dataset = FederatedDataset([part for one in dataset for part in one.parts])
        if not isinstance(dataset, FederatedDataset):
            hint = (
                "call .federate((a, b)) on it first" if isinstance(dataset, Dataset) else "expected a FederatedDataset"
            )
            raise UsageError(f"FederatedDataLoader was given a {type(dataset).__name__}: {hint}")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise UsageError(f"batch_size is a whole number of at least 1, found {batch_size!r}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.interleave = interleave
        self.generator = generator

    @property
    def workers(self) -> list[Any]:
        """The workers whose records the batches hold."""
        return self.dataset.workers

    def __len__(self) -> int:
        return sum(self._batches(part) for part in self.dataset.parts)

    def __iter__(self) -> Iterator[Any]:
        orders = [self._order(part) for part in self.dataset.parts]
        if self.interleave:
            turns = [iter(self._of(part, order)) for part, order in zip(self.dataset.parts, orders, strict=True)]
            while turns:
                for turn in tuple(turns):
                    try:
                        yield next(turn)
                    except StopIteration:
                        turns.remove(turn)
        else:
            for part, order in zip(self.dataset.parts, orders, strict=True):
                yield from self._of(part, order)

    def __repr__(self) -> str:
        how = ", shuffled" if self.shuffle else ""
        return f"<FederatedDataLoader: {len(self):,} batches of {self.batch_size}{how} of {self.dataset!r}>"

    def _batches(self, part: Part) -> int:
        whole, rest = divmod(len(part), self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def _order(self, part: Part) -> torch.Tensor | None:
        return torch.randperm(len(part), generator=self.generator) if self.shuffle else None

    def _of(self, part: Part, order: torch.Tensor | None) -> Iterator[Any]:
        session, site, assembled = session_of(part.location), caller(), part.assembled
        session.check_open()
        if order is None:
            splits = [torch.split(column, self.batch_size)[: self._batches(part)] for column in part.columns]
            for pieces in zip(*splits, strict=True):
                yield assembled([piece.clone() for piece in pieces])
            return
        for chosen in _ahead(session, order, self.batch_size, self._batches(part), site):
            yield assembled(list(say(PointerTensor, session, _selected, _selected, (chosen.pop(), *part.columns))))


def _ahead(session: Session, order: torch.Tensor, size: int, count: int, site: Site | None) -> Iterator[list[Slot]]:
    """The slots of `count` pieces of this size, some sent at once: what is done many times in a row costs less each.
    Each comes in a list of its own, so that whoever takes it has it alone."""
    for start in range(0, count, AHEAD):
        pieces = _split_copy(order[start * size : (start + AHEAD) * size], size)[: count - start]
        yield from [[slot] for slot in session.put_own(pieces, site)]


def _selected(chosen: PointerTensor, *columns: PointerTensor) -> list[torch.Tensor]:
    """The records of these numbers, of each column."""
    return [column.index_select(0, chosen) for column in columns]


def _assembled(structure: Any) -> Callable[[list[Any]], Any]:
    """What makes a sample of its columns."""
    for kind in (tuple, list):
        if structure == tree_flatten(kind([0] * structure.num_leaves))[1]:
            return kind
    return functools.partial(tree_unflatten, treespec=structure)


def federate(
    dataset: Dataset[Any], workers: Sequence[Any], indices: Sequence[Sequence[int]] | None = None
) -> FederatedDataset:
    """Split a map-style data set among workers and send each its part, transforms applied.

    In equal contiguous parts (sizes differ by one at most), or by `indices`, a list of record numbers for each
    worker, so that real owners can be kept apart. Memory stays near that of one copy of the data."""
    if not isinstance(workers, Sequence):
        workers = (workers,)
    sessions = [session_of(worker) for worker in workers]
    if hasattr(indices, "session"):
        raise UsageError("federate takes the workers together: dataset.federate((a, b))")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise UsageError(f"a {type(dataset).__name__} cannot be split: federate takes a data set with a length")
    chosen = _split(len(dataset), len(workers)) if indices is None else indices
    if len({worker.id for worker in workers}) != len(workers):
        raise UsageError("a worker is named twice; give each its own part once, and each worker a name of its own")
    _check(len(dataset), [worker.id for worker in workers], chosen)
    return FederatedDataset(
        [_send_part(dataset, session, part) for session, part in zip(sessions, chosen, strict=True)]
    )


def _split(records: int, parts: int) -> list[range]:
    if parts < 1:
        raise UsageError("federate needs at least one worker: dataset.federate((a, b))")
    bounds = [records * n // parts for n in range(parts + 1)]
    return [range(start, end) for start, end in pairwise(bounds)]


def _check(records: int, names: list[str], chosen: Sequence[Sequence[int]]) -> None:
    if records == 0:
        raise DataError("the data set is empty: there is nothing to send to " + ", ".join(names))
    if len(chosen) != len(names):
        raise UsageError(f"{len(chosen)} lists of indices for {len(names)} workers; give one list for each")
    if len(names) > records:
        raise DataError(f"{len(names)} workers, but only {records} records: each worker needs at least one")
    taken: dict[int, str] = {}
    for name, part in zip(names, chosen, strict=True):
        _check_indices(name, part)
        if len(part) == 0:
            raise DataError(f"no records for '{name}': each worker needs at least one")
        for index in part:
            if not 0 <= index < records:
                raise DataError(f"record {index} for '{name}' does not exist; there are records 0 to {records - 1}")
            if taken.setdefault(int(index), name) != name:
                raise DataError(f"record {index} is given to both '{taken[int(index)]}' and '{name}'")


def _check_indices(name: str, part: Any) -> None:
    """Refuse what is no list of record numbers."""
    if isinstance(part, str | dict | set) or not hasattr(part, "__len__"):
        raise UsageError(f"the records for '{name}' are a list of numbers, found a {type(part).__name__}")
    dtype = getattr(part, "dtype", None)
    kinds = {str(dtype).removeprefix("torch.")} if dtype is not None else {type(index).__name__ for index in part}
    wrong = [kind for kind in kinds if not re.fullmatch(r"u?int\d*", kind)]
    if wrong:
        hint = ": a mask is turned into numbers with mask.nonzero()" if wrong[0].startswith("bool") else ""
        raise UsageError(f"the records for '{name}' are numbers such as 0, 7, 12, found a {wrong[0]}{hint}")


def _send_part(dataset: Dataset[Any], session: Session, indices: Sequence[int]) -> Part:
    columns, structure = _collate(dataset, indices)
    pointers = [send(column, session.location) for column in columns]
    session.flush()
    return Part(session.location, pointers, structure)


def _collate(dataset: Dataset[Any], indices: Sequence[int]) -> tuple[list[torch.Tensor], Any]:
    """The records as columns, (records, ...) each. Filled chunk by chunk, so the data is in memory once."""
    if isinstance(dataset, TensorDataset):
        picked = torch.as_tensor(list(indices))
        picked_columns = [column.detach().index_select(0, picked) for column in dataset.tensors]
        return picked_columns, tree_flatten(dataset[0])[1]
    columns: list[torch.Tensor] = []
    structure: Any = None
    for start in range(0, len(indices), CHUNK):
        wanted = [int(index) for index in indices[start : start + CHUNK]]
        batch, structure = tree_flatten(_collated(_samples(dataset, wanted), wanted[0]))
        for leaf in batch:
            if not isinstance(leaf, torch.Tensor):
                raise DataError(f"a record holds a {type(leaf).__name__}; only tensors and numbers can be sent")
        _check_alike(columns, batch, wanted[0])
        columns = columns or [torch.empty((len(indices), *leaf.shape[1:]), dtype=leaf.dtype) for leaf in batch]
        for column, leaf in zip(columns, batch, strict=True):
            column[start : start + len(wanted)] = leaf
    return columns, structure


def _collated(samples: list[Any], first: int) -> Any:
    try:
        return default_collate(samples)
    except (RuntimeError, TypeError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        hint = ": give the data set a transform that makes tensors, such as ToTensor()" if "PIL" in reason else ""
        raise DataError(f"records {first} and on cannot be laid side by side ({reason}){hint}") from None


def _check_alike(columns: list[torch.Tensor], batch: list[torch.Tensor], first: int) -> None:
    """Raise `DataError` if records are of another kind than those before them."""
    if not columns:
        return
    if len(columns) != len(batch):
        raise DataError(f"records from {first} on have {len(batch)} parts, those before have {len(columns)}")
    for column, leaf in zip(columns, batch, strict=True):
        if (leaf.dtype, leaf.shape[1:]) != (column.dtype, column.shape[1:]):
            found, before = (f"{tensor.dtype} of shape {tuple(tensor.shape[1:])}" for tensor in (leaf, column))
            raise DataError(f"records from {first} on hold {found}, those before hold {before}: make them alike")


def _samples(dataset: Dataset[Any], indices: list[int]) -> list[Any]:
    together = getattr(dataset, "__getitems__", None)
    return together(indices) if together else [dataset[index] for index in indices]
