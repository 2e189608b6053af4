"""What a session did to private data, as a program: what its owner reads before she lets a value out.

Calls are kept from the first that touched private data on, without values. The program of a value is what it depends
on, walked backward: its inputs are columns of data sets, by name, and what the scientist brought. A run of a program is
kept as one `Episode`, and said in calls only when somebody reads it.

NOTE [Bindings]
A caller may let go of an id and give it to another value; a program in which one name stood for two would say what she
likes. So here each binding of a slot has a number of its own (`Store.bindings`), and calls are kept over those.

NOTE [Draws]
What draws random numbers reads the generator and writes to it, which tells what was drawn before. So the program of a
value has all draws on private data since the generator was seeded, as if it were one more storage.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..program.call import HOLE, Arg, Call, Input, Items, Program, refs, replaced
from ..program.flow import written
from ..program.ops import operator
from ..program.outcome import Spec
from ..types import Ref, TensorType
from .store import Cell, Store

__all__ = ["Episode", "History"]

MOST = 100_000  # calls; beyond it the oldest are forgotten, and the program says so


class _Done(NamedTuple):
    """A call over bindings, with the cells that it read, and made or wrote."""

    call: Call
    read: frozenset[Cell]
    made: frozenset[Cell]


class Episode(NamedTuple):
    """A run of a program: its calls on private data, over the program's ids, and the cells that it made or wrote.

    `bindings` and `cells` are those of its inputs and outputs, by id and by the number of a storage; what it made on
    its way gets ids of `fresh` when it is said. `storages` and `specs` are of all ids."""

    calls: tuple[Call, ...]
    made: frozenset[Cell]
    bindings: dict[int, int]
    cells: dict[int, Cell]
    numbers: dict[int, float]
    storages: dict[int, int]
    specs: dict[int, Spec]
    generator: Cell
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
        self.generator = Cell(0, 0)

    def seeded(self) -> None:
        """The generator begins anew: see NOTE [Draws]."""
        self.generator = Cell(0, 0)

    def lent(self, ref: int, name: str, store: Store) -> None:
        """A column of a data set was bound to a slot: `name` is "heart.x"."""
        self._columns[store.bindings[ref]] = name

    def add(self, call: Call, read: list[int], written: list[int], store: Store) -> None:
        """A call was run; it `read` and has `written` to these slots. By their cells what it wrote to is found through
        every alias."""
        cells, bindings = store.cells, store.bindings
        made = frozenset(cells[ref] for ref in (*call.outs, *written) if ref in cells)
        self._saw(read, store)
        outs = tuple([bindings.get(out, HOLE) for out in call.outs])
        over = replaced(call, lambda ref: Ref(bindings[ref.id]), outs)
        draws = _draws(call, self.generator)
        self._keep(_Done(over, draws.union([cells[ref] for ref in read]), made | draws), 1)

    def same(self, source: int, out: int, store: Store) -> None:
        """A slot was bound to what another one holds, without a call: by a run that gives out an input, or one value
        twice. It is said as a view of the same shape."""
        shape = Items(tuple(store.specs[source].size))
        self.add(Call("view.default", (Ref(source), shape), {}, (out,)), [source], [], store)

    def _saw(self, slots: Iterable[int], store: Store) -> None:
        for ref in slots:
            binding = store.bindings[ref]
            self._types[binding] = store.specs[ref].type
            self._cells[binding] = store.cells[ref]

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
            self._forget()

    def _forget(self) -> None:
        """Let go of what is known of bindings that no call has any more."""
        known = set(self._columns)
        for done in self._done:
            if isinstance(done, Episode):
                known.update(done.bindings.values())
            else:
                known.update(ref for arg in (*done.call.args, *done.call.kwargs.values()) for ref in refs(arg))
        self._types = {ref: type_ for ref, type_ in self._types.items() if ref in known}
        self._cells = {ref: cell for ref, cell in self._cells.items() if ref in known}

    def program(self, wanted: tuple[int, ...], store: Store) -> Program:
        """How these values of a store came to be: only what they depend on, in order."""
        self._saw(wanted, store)
        needed, kept = {store.cells[ref] for ref in wanted}, []
        results = [store.bindings[ref] for ref in wanted]
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
        began = sorted({*read_ids, *results} - made_ids)
        brought = [ref for ref in began if ref not in self._columns]
        numbers = {cell: at for at, cell in enumerate(dict.fromkeys(map(self._cells.__getitem__, brought)))}
        inputs = tuple(Input(self._name(ref, began, numbers), ref, self._types[ref]) for ref in began)
        return Program(inputs, calls, tuple((f"value{number}", ref) for number, ref in enumerate(results)))

    def _said(self, episode: Episode) -> list[_Done]:
        """The calls of an episode over bindings, as if they had been issued one by one."""
        bindings, cells = episode.bindings, episode.cells

        def binding(ref: int) -> int:
            if ref not in bindings:
                bindings[ref] = next(episode.fresh)
            return bindings[ref]

        def cell(ref: int) -> Cell:
            return cells.setdefault(episode.storages[ref], Cell(0, 0))

        def placed(ref: Ref) -> Arg:
            return episode.numbers[ref.id] if ref.id in episode.numbers else Ref(binding(ref.id))

        found = []
        for call in episode.calls:
            read = [ref for arg in (*call.args, *call.kwargs.values()) for ref in refs(arg)]
            read = [ref for ref in read if ref not in episode.numbers]
            self._types.update((binding(ref), episode.specs[ref].type) for ref in read)
            self._cells.update((binding(ref), cell(ref)) for ref in read)
            made = [*[out for out in call.outs if out != HOLE], *written(call, operator(call.op))]
            outs = tuple([out if out == HOLE else binding(out) for out in call.outs])
            over = replaced(call, placed, outs)
            draws = _draws(call, episode.generator)
            found.append(_Done(over, draws.union(map(cell, read)), draws.union(map(cell, made))))
        return found

    def _name(self, ref: int, began: list[int], numbers: dict[Cell, int]) -> str:
        """A column's name, or a number that all views of one storage share."""
        if ref in self._columns:
            return self._columns[ref]
        cell = self._cells[ref]
        alike = [other for other in began if self._cells[other] is cell].index(ref)
        return f"brought{numbers[cell]}" + f"_view{alike}" * bool(alike)


def _draws(call: Call, generator: Cell) -> frozenset[Cell]:
    """The generator, for what draws from it."""
    return frozenset((generator,)) if operator(call.op).random else frozenset()
