"""What a session did to private data, as a program: what its owner reads before she lets a value out.

Calls are kept from the first that touched private data on, without values. The program of a value is what it depends
on, walked backward: its inputs are columns of data sets, by name, and what the scientist brought.
"""

from __future__ import annotations

from ..program.call import HOLE, Call, Input, Program, refs
from ..program.flow import written
from ..program.ops import operator
from ..types import TensorType

__all__ = ["History"]

MOST = 100_000  # calls; beyond it the oldest are forgotten, and the program says so


class History:
    """The calls of one session that read or wrote private data, and the types of what they began with."""

    def __init__(self) -> None:
        self.forgotten = 0
        self._calls: list[Call] = []
        self._types: dict[int, TensorType] = {}
        self._columns: dict[int, str] = {}

    def lent(self, ref: int, name: str, type_: TensorType) -> None:
        """A column of a data set was bound: `name` is "heart.x"."""
        self._columns[ref] = name
        self._types[ref] = type_

    def add(self, call: Call, types: dict[int, TensorType]) -> None:
        """A call was run; `types` are those of its arguments."""
        self._calls.append(call)
        self._types.update(types)
        if len(self._calls) > MOST:
            dropped = len(self._calls) // 2
            self.forgotten += dropped
            del self._calls[:dropped]

    def program(self, wanted: tuple[int, ...]) -> Program:
        """How these values came to be: only what they depend on, in order."""
        needed, kept = set(wanted), []
        for call in reversed(self._calls):
            writes = written(call, operator(call.op))
            if needed.intersection(call.outs) or needed.intersection(writes):
                kept.append(call)
                needed.update(ref for arg in (*call.args, *call.kwargs.values()) for ref in refs(arg))
        calls = tuple(reversed(kept))
        made = {out for call in calls for out in call.outs if out != HOLE}
        began = sorted(ref for ref in needed if ref not in made and ref in self._types)
        inputs = tuple(Input(self._name(ref, number), ref, self._types[ref]) for number, ref in enumerate(began))
        return Program(inputs, calls, tuple((f"value{number}", ref) for number, ref in enumerate(wanted)))

    def _name(self, ref: int, number: int) -> str:
        return self._columns.get(ref, f"brought{number}")
