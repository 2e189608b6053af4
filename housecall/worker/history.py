"""What a session did to private data, as a program: what its owner reads before she lets a value out.

Calls are kept from the first that touched private data on, without values. The program of a value is what it depends
on, walked backward: its inputs are columns of data sets, by name, and what the scientist brought.
"""

from __future__ import annotations

from ..program.call import HOLE, Call, Input, Program, refs
from ..types import TensorType
from .store import Cell, Store

__all__ = ["History"]

MOST = 100_000  # calls; beyond it the oldest are forgotten, and the program says so


class History:
    """The calls of one session that read or wrote private data, and the types of what they began with."""

    def __init__(self) -> None:
        self.forgotten = 0
        self._calls: list[tuple[Call, frozenset[Cell], frozenset[Cell]]] = []  # with what it read, made or wrote
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
        self._calls.append((call, frozenset(cells[ref] for ref in types), made))
        self._types.update(types)
        self._cells.update((ref, cells[ref]) for ref in types)
        if len(self._calls) > MOST:
            dropped = len(self._calls) // 2
            self.forgotten += dropped
            del self._calls[:dropped]

    def program(self, wanted: tuple[int, ...], store: Store) -> Program:
        """How these values of a store came to be: only what they depend on, in order."""
        self._cells.update((ref, store.cells[ref]) for ref in wanted)
        self._types.update((ref, store.specs[ref].type) for ref in wanted)
        needed, kept = {store.cells[ref] for ref in wanted}, []
        for call, read, made in reversed(self._calls):
            if not needed.isdisjoint(made):
                kept.append(call)
                needed.update(read)
        calls = tuple(reversed(kept))
        read_ids = {ref for call in calls for arg in (*call.args, *call.kwargs.values()) for ref in refs(arg)}
        made_ids = {out for call in calls for out in call.outs if out != HOLE}
        began = sorted({*read_ids, *wanted} - made_ids)
        numbers = {cell: at for at, cell in enumerate(dict.fromkeys(self._cells[ref] for ref in began))}
        inputs = tuple(Input(self._name(ref, began, numbers), ref, self._types[ref]) for ref in began)
        return Program(inputs, calls, tuple((f"value{number}", ref) for number, ref in enumerate(wanted)))

    def _name(self, ref: int, began: list[int], numbers: dict[Cell, int]) -> str:
        """A column's name, or a number that all views of one storage share."""
        cell = self._cells[ref]
        alike = [other for other in began if self._cells[other] is cell].index(ref)
        return self._columns.get(ref, f"brought{numbers[cell]}" + f"_view{alike}" * bool(alike))
