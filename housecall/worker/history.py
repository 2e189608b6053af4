"""What a session did to private data, as a program: what its owner reads before she lets a value out.

Calls are kept from the first that touched private data on, without values. The program of a value is what it depends
on, walked backward: its inputs are columns of data sets, by name, and what the scientist brought. A run of a program is
kept as one `Episode`, and said in calls only when somebody reads it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from ..program.call import HOLE, Arg, Call, Input, Program, refs, replaced
from ..program.flow import written
from ..program.ops import operator
from ..program.outcome import Spec
from ..types import Ref, TensorType
from .store import Cell, Store

__all__ = ["Episode", "History"]

MOST = 100_000  # calls; beyond it the oldest are forgotten, and the program says so


class _Done(NamedTuple):
    """A call over slots, with the cells that it read, and made or wrote."""

    call: Call
    read: frozenset[Cell]
    made: frozenset[Cell]


class Episode(NamedTuple):
    """A run of a program: its calls on private data, over the program's ids, and the cells that it made or wrote.

    `slots` and `cells` are those of its inputs and outputs, by id and by the number of a storage; what it made on its
    way gets ids of `fresh` when it is said. `storages` and `specs` are of all ids."""

    calls: tuple[Call, ...]
    made: frozenset[Cell]
    slots: dict[int, int]
    cells: dict[int, Cell]
    numbers: dict[int, float]
    storages: dict[int, int]
    specs: dict[int, Spec]
    fresh: Iterator[int]


class History:
    """The calls of one session that read or wrote private data, and the types of what they began with."""

    def __init__(self) -> None:
        self.forgotten = 0
        self._kept = 0
        self._done: deque[_Done | Episode] = deque()
        self._types: dict[int, TensorType] = {}
        self._columns: dict[int, str] = {}
        self._cells: dict[int, Cell] = {}

    def lent(self, ref: int, name: str, type_: TensorType) -> None:
        """A column of a data set was bound: `name` is "heart.x"."""
        self._columns[ref] = name
        self._types[ref] = type_

    def add(self, call: Call, types: dict[int, TensorType], cells: dict[int, Cell], written: list[int]) -> None:
        """A call was run; `types` are those of its arguments, `cells` whose storage each slot is. By those what it
        `written` to is found through every alias, and under an id that was given anew."""
        made = frozenset(cells[ref] for ref in (*call.outs, *written) if ref in cells)
        self._types.update(types)
        self._cells.update((ref, cells[ref]) for ref in types)
        self._keep(_Done(call, frozenset(cells[ref] for ref in types), made), 1)

    def ran(self, episode: Episode) -> None:
        """A program was run."""
        self._keep(episode, len(episode.calls))

    def _keep(self, done: _Done | Episode, calls: int) -> None:
        self._done.append(done)
        self._kept += calls
        if self._kept > MOST:
            while self._kept > MOST // 2:
                oldest = self._done.popleft()
                count = len(oldest.calls) if isinstance(oldest, Episode) else 1
                self._kept -= count
                self.forgotten += count

    def program(self, wanted: tuple[int, ...], store: Store) -> Program:
        """How these values of a store came to be: only what they depend on, in order."""
        self._cells.update((ref, store.cells[ref]) for ref in wanted)
        self._types.update((ref, store.specs[ref].type) for ref in wanted)
        needed, kept = {store.cells[ref] for ref in wanted}, []
        for done in reversed(self._done):
            if needed.isdisjoint(done.made):
                continue
            for one in reversed(self._said(done)) if isinstance(done, Episode) else (done,):
                if not needed.isdisjoint(one.made):
                    kept.append(one.call)
                    needed.update(one.read)
        calls = tuple(reversed(kept))
        read_ids = {ref for call in calls for arg in (*call.args, *call.kwargs.values()) for ref in refs(arg)}
        made_ids = {out for call in calls for out in call.outs if out != HOLE}
        began = sorted({*read_ids, *wanted} - made_ids)
        numbers = {cell: at for at, cell in enumerate(dict.fromkeys(self._cells[ref] for ref in began))}
        inputs = tuple(Input(self._name(ref, began, numbers), ref, self._types[ref]) for ref in began)
        return Program(inputs, calls, tuple((f"value{number}", ref) for number, ref in enumerate(wanted)))

    def _said(self, episode: Episode) -> list[_Done]:
        """The calls of an episode over slots, as if they had been issued one by one."""
        slots, cells = episode.slots, episode.cells

        def slot(ref: int) -> int:
            if ref not in slots:
                slots[ref] = next(episode.fresh)
            return slots[ref]

        def cell(ref: int) -> Cell:
            return cells.setdefault(episode.storages[ref], Cell(0, 0))

        def placed(ref: Ref) -> Arg:
            return episode.numbers[ref.id] if ref.id in episode.numbers else Ref(slot(ref.id))

        found = []
        for call in episode.calls:
            read = [ref for arg in (*call.args, *call.kwargs.values()) for ref in refs(arg)]
            read = [ref for ref in read if ref not in episode.numbers]
            self._types.update((slot(ref), episode.specs[ref].type) for ref in read)
            self._cells.update((slot(ref), cell(ref)) for ref in read)
            made = [*[out for out in call.outs if out != HOLE], *written(call, operator(call.op))]
            outs = tuple([out if out == HOLE else slot(out) for out in call.outs])
            over = replaced(call, placed, outs)
            found.append(_Done(over, frozenset(map(cell, read)), frozenset(map(cell, made))))
        return found

    def _name(self, ref: int, began: list[int], numbers: dict[Cell, int]) -> str:
        """A column's name, or a number that all views of one storage share."""
        cell = self._cells[ref]
        alike = [other for other in began if self._cells[other] is cell].index(ref)
        return self._columns.get(ref, f"brought{numbers[cell]}" + f"_view{alike}" * bool(alike))
