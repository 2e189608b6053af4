"""Where labels go: which values of a program derive from which owned data sets. A pure walk, before anything runs.

The rule is one line: a result has the labels of all arguments, and so has whatever the call writes to. Values that may
share a storage share a label, since a write to one is a write to all; what an operator *may* alias is taken to alias
here, while a worker's store sees the storages themselves. So a store's label is never more than the one found here.

What draws random numbers reads the generator and writes to it: how much was drawn may depend on elements. So whatever
is drawn after a draw on private data has its label, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from ..types import PUBLIC, Label
from .call import HOLE, Call, Input, Program, refs, with_numbers
from .check import arguments, check, written_by
from .ops import Operator, operator

__all__ = ["flow", "input_writes", "with_updates", "written"]


def flow(program: Program, labels: Mapping[str, Label]) -> dict[str, Label]:
    """The labels of a program's outputs, given those of its inputs by name; an input that is not named is public. So
    are a program's numbers. An input that the program updates is listed with its label after the run.

    Raises `ProgramError` for a program that may not run."""
    check(program)
    walk = _Walk()
    for item in program.inputs:
        walk.bind(item.id, labels.get(item.name, PUBLIC), ())
    for call in _without_numbers(program):
        walk.call(call)
    updated = {item.name: walk.label(item.id) for item in program.inputs if item.updates}
    return {**updated, **{name: walk.label(ref) for name, ref in program.outputs}}


def _without_numbers(program: Program) -> tuple[Call, ...]:
    return with_numbers(program, {name: 0.0 for name, _ in program.numbers}).calls


def written(call: Call, rules: Operator) -> list[int]:
    """The ids that a call writes to in place."""
    return [ref for _, arg in written_by(rules, call) for ref in refs(arg)] if rules.writes else []


def input_writes(program: Program) -> Iterator[tuple[int, Input]]:
    """Which call of a program may write to which of its inputs: the call's number, the input. Views count."""
    shares = {item.id: {item.id} for item in program.inputs}  # whose storage a value may share
    by_id = {item.id: item for item in program.inputs}
    for number, call in enumerate(program.calls):
        rules = operator(call.op)
        for ref in written(call, rules) if rules.writes else ():
            yield from ((number, by_id[root]) for root in sorted(shares.get(ref, ())))
        by_name = {param.name: arg for param, arg in arguments(rules, call)}
        sources = [by_name[item.view_of] for item in rules.returns if item.view_of in by_name]
        roots = {root for source in sources for ref in refs(source) for root in shares.get(ref, ())}
        if roots:
            shares.update(dict.fromkeys(call.outs, roots))


def with_updates(program: Program) -> Program:
    """The same program, saying of each input whether it may change it."""
    updated = {item.id for _, item in input_writes(program)}
    inputs = tuple([msgspec.structs.replace(item, updates=item.id in updated) for item in program.inputs])
    return msgspec.structs.replace(program, inputs=inputs)


class _Walk:
    """Labels by group: ids whose values may share a storage are in one."""

    def __init__(self) -> None:
        self._group: dict[int, int] = {}
        self._labels: dict[int, Label] = {}
        self._drawn = PUBLIC

    def label(self, ref: int) -> Label:
        return self._labels[self._root(ref)]

    def join(self, ref: int, label: Label) -> None:
        """What this id holds, and all that may share its storage, derives from `label` as well."""
        if ref != HOLE:
            self._labels[self._root(ref)] = self.label(ref) | label

    def bind(self, ref: int, label: Label, shares: tuple[int, ...]) -> None:
        self._group[ref] = ref
        self._labels[ref] = label
        for other in shares:
            self._join(ref, other)

    def call(self, call: Call) -> None:
        rules = operator(call.op)
        label = PUBLIC
        for arg in (*call.args, *call.kwargs.values()):
            for ref in refs(arg):
                label = label | self.label(ref)
        if rules.random:
            label = self._drawn = self._drawn | label
        for ref in written(call, rules):
            self.join(ref, label)
        by_name = {param.name: arg for param, arg in arguments(rules, call)}
        sources = [by_name[item.view_of] for item in rules.returns if item.view_of in by_name]
        shares = tuple(ref for source in sources for ref in refs(source))
        for out in call.outs:
            if out != HOLE:
                self.bind(out, label, shares)

    def _root(self, ref: int) -> int:
        while self._group[ref] != ref:
            self._group[ref] = self._group[self._group[ref]]
            ref = self._group[ref]
        return ref

    def _join(self, one: int, other: int) -> None:
        here, there = self._root(one), self._root(other)
        if here != there:
            self._group[here] = there
            self._labels[there] = self._labels[there] | self._labels[here]
