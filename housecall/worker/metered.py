"""Runs of programs in a session that has an account: sized, labelled, and written into its history.

What must live here: how a run through a meter goes. What must not: what a call may take (`limits`), what a caller may
see of private data (`private`), steps (`plan`).

NOTE [The first run and those after it]
A program's calls go one by one through the session's meter, as if they had been issued so; and what they took, made and
were labelled is kept. That depends on the types and labels of the inputs alone, or it is not kept. The next run on
inputs of the same types and labels would be judged alike, so it is judged as a whole, and its steps run. Going call by
call is the plain twin, and where anything is out of the ordinary (an input that failed, limits that are near, data that
is lent and would be written) that is how it goes.

NOTE [Ids within a run]
What a program makes on its way stands in the session's store when it goes call by call, and in its history, under ids
from 2**64 on: a peer cannot say these, since no integer beyond 64 bits travels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from ..errors import ProgramError
from ..program.call import HOLE, Arg, Call, refs, replaced
from ..program.flow import written
from ..program.forecast import Made
from ..program.ops import operator
from ..program.outcome import Spec
from ..program.typing import address_of
from ..types import PUBLIC, Label, Ref
from ..wire.messages import Run
from .history import Episode
from .limits import Meter
from .plan import NONE, Plan, Precedents, Report
from .private import blank, note_failure, settled
from .store import Cell, Failed, Store

__all__ = ["Metered", "Precedent"]


class Precedent(NamedTuple):
    """What a run took when it went call by call. Bytes: `most` of one call, `fresh` beyond what was held, at its peak;
    `slots` likewise. `labels` has one for each call; `specs`, `cells`, `nbytes` and `after` are of the program's ids,
    also of its inputs afterwards: their types, a number and the bytes of each storage, their labels. `made`: which
    storages the calls that have a label made, took views of or wrote to."""

    most: int
    flops: int
    fresh: int
    slots: int
    seconds: float
    labels: tuple[Label, ...]
    specs: dict[int, Spec]
    cells: dict[int, int]
    nbytes: dict[int, int]
    after: dict[int, Label]
    made: frozenset[int]
    drawn: Label

    def result(self, ref: int, shared: Collection[int] = ()) -> Made:
        """What stands under an id; its storage is its own unless it is among those that are `shared`, by number."""
        return Made(self.specs[ref], self.nbytes[ref], self.cells[ref] not in shared)


class Metered:
    """One run through a meter: see NOTE [The first run and those after it]. `values` are those of its inputs,
    `precedents` those by which it goes, the program's own unless said."""

    def __init__(
        self,
        plan: Plan,
        message: Run,
        values: list[Any],
        store: Store,
        meter: Meter,
        ids: Iterator[int],
        precedents: Precedents | None = None,
    ) -> None:
        self._plan, self._message, self._values = plan, message, values
        self._store, self._meter, self._ids = store, meter, ids
        self._precedents = plan.precedents if precedents is None else precedents
        self._inputs = {item.id: ref for item, ref in zip(plan.program.inputs, message.inputs, strict=True)}

    def run(self, report: Report, every: int) -> Iterator[None]:
        """Run it; `report` is told of each call that fails and may be told."""
        key = self._key()
        known = self._precedents.get(key) if key is not None else None
        if known is not None and (self._precedents.closed or self._allows(known)):
            yield from self._as(known, report, every)
            return
        walk = _CallByCall(self._plan, self._message, self._inputs, self._store, self._meter, self._ids)
        yield from walk.run(report)
        if key is not None and walk.precedent is not None:
            self._precedents.learn(key, walk.precedent)

    def _allows(self, known: Precedent) -> bool:
        return self._meter.allows(known.most, known.flops, known.fresh, known.slots, 2 * known.seconds)

    def _key(self) -> Any:
        """What decides how a run is judged; `None` for one out of the ordinary."""
        if not self._plan.alike:
            return None
        store = self._store
        cells: list[Cell] = []
        key: list[Any] = [store.drawn]
        for item, ref in zip(self._plan.program.inputs, self._message.inputs, strict=True):
            cell = store.cells.get(ref)
            if cell is None or cell.failed or (item.updates and cell.address in store.lent):
                return None
            cells.append(cell)
            key += (store.specs[ref].start, cell.label)
        if len(set(cells)) < len(cells):
            if self._plan.updates:  # a write to one is a write to another
                return None
            key += [cells.index(cell) for cell in cells]
        return tuple(key)

    # -- as once before -----------------------------------------------------------------------------------

    def _as(self, known: Precedent, report: Report, every: int) -> Iterator[None]:
        plan, store, message = self._plan, self._store, self._message
        undone: set[int] = set()
        failed: set[int] = set()
        device = next((value.device for value in self._values if isinstance(value, torch.Tensor)), torch.device("cpu"))

        def told(number: int, call: Call, error: Exception) -> Any:
            if isinstance(error, Failed):  # of something that is not private, and therefore this was not done
                undone.add(number)
                return report(number, call, error)
            label = (self._again(known, undone, failed)[0] if undone else known).labels[number]
            if not label:  # its caller may know
                return report(number, call, error)
            failed.add(number)
            note_failure(call, label, error)
            return [None if out == HOLE else blank(known.result(out), device) for out in call.outs] or None

        registers = plan.registers(self._values, message.numbers)
        yield from plan.run(registers, told, every, looks=True)
        failures: set[int] = set()  # storages that are not what they should be
        if undone or failed:
            known, failures = self._again(known, undone, failed)
        shared = {known.cells[ref] for ref in self._inputs}
        taken = {address_of(value) for value in self._values if isinstance(value, torch.Tensor)}
        for (_, ref), out, value in zip(plan.program.outputs, message.outs, plan.outputs(registers), strict=True):
            if isinstance(value, torch.Tensor):
                if known.after[ref]:
                    value = settled(value, known.result(ref, shared), taken, device)
                    shared.add(known.cells[ref])
                store[out] = value
                expected = known.specs[ref]
                store.count(out, value, expected if value.storage_offset() == expected.offset else None)
                self._mark(out, known.after[ref], known.cells[ref] in failures)
            else:
                self._meter.stand_in(out, value)
        for item in plan.updates:
            slot = self._inputs[item.id]
            store.cells[slot].writes += 1
            self._mark(slot, known.after[item.id], known.cells[item.id] in failures)
        store.drawn = known.drawn
        if any(known.labels):
            self._meter.history.ran(self._episode(known))
        self._note_aliases()

    def _again(self, known: Precedent, undone: set[int], failed: set[int]) -> tuple[Precedent, set[int]]:
        """The same for a run in which some calls were not done, and others failed on private data; and the storages
        whose elements derive from such a failure."""
        labels: list[Label] = []
        failures: set[int] = set()
        of = {known.cells[ref]: self._store.label(slot) for ref, slot in self._inputs.items()}
        drawn = self._store.drawn
        for number, call in enumerate(self._plan.calls):
            rules = operator(call.op)
            args = (*call.args, *call.kwargs.values())
            read = {known.cells[ref] for arg in args for ref in refs(arg) if ref in known.cells}  # else a number
            label = drawn if rules.random else PUBLIC
            for cell in read:
                label = label | of.get(cell, PUBLIC)
            labels.append(PUBLIC if number in undone else label)
            if not labels[-1]:
                continue
            if rules.random:
                drawn = drawn | label
            fails = number in failed or not failures.isdisjoint(read)
            for ref in (*call.outs, *written(call, rules)):
                if ref != HOLE:
                    cell = known.cells[ref]
                    of[cell] = of.get(cell, PUBLIC) | label
                    failures |= {cell} if fails else set()
        after = {ref: of.get(cell, PUBLIC) for ref, cell in known.cells.items()}
        made = _made(self._plan.calls, labels, known.cells)
        return known._replace(labels=tuple(labels), after=after, made=made, drawn=drawn), failures

    def _note_aliases(self) -> None:
        """Outputs that are inputs, or twice the same, in the history: no call has bound them."""
        slots = dict(self._inputs)
        for (_, ref), out in zip(self._plan.program.outputs, self._message.outs, strict=True):
            source = slots.setdefault(ref, out)
            if source != out and self._store.label(out):
                self._meter.history.same(source, out, self._store)

    def _mark(self, slot: int, label: Label, failed: bool) -> None:
        if label:
            self._store.mark((slot,), label, failed=failed)

    def _episode(self, known: Precedent) -> Episode:
        """What was done, for the history: to be said in calls when its owner reads it."""
        cells, program = self._store.cells, self._plan.program
        slots = dict(self._inputs)
        for (_, ref), out in zip(program.outputs, self._message.outs, strict=True):
            slots.setdefault(ref, out)
        known_cells = {known.cells[ref]: cells[slot] for ref, slot in slots.items() if slot in cells}
        bindings = {ref: self._store.bindings[slot] for ref, slot in slots.items() if slot in self._store.bindings}
        calls = tuple([call for call, label in zip(self._plan.calls, known.labels, strict=True) if label])
        numbers = {ref: number for (_, ref), number in zip(program.numbers, self._message.numbers, strict=True)}
        made = frozenset([known_cells[cell] for cell in known.made if cell in known_cells])
        generator = self._meter.history.generator
        if any(operator(call.op).random for call in calls):
            made |= {generator}
        return Episode(calls, made, bindings, known_cells, numbers, known.cells, known.specs, generator, self._ids)


class _CallByCall:
    """One run, call by call; `precedent` is then what it took, if that says anything of the next."""

    def __init__(
        self, plan: Plan, message: Run, inputs: dict[int, int], store: Store, meter: Meter, ids: Iterator[int]
    ) -> None:
        self._plan, self._message, self._store, self._meter, self._ids = plan, message, store, meter, ids
        program = plan.program
        self._given = frozenset(inputs)
        self._slots = dict(inputs)
        self._numbers = {ref: number for (_, ref), number in zip(program.numbers, message.numbers, strict=True)}
        self._outs: dict[int, int] = {}  # id in the program -> slot, of what a call makes
        for (_, ref), out in zip(program.outputs, message.outs, strict=True):
            if ref not in self._given:
                self._outs.setdefault(ref, out)
        self._bound: set[int] = set()  # slots that this run has bound
        self._failed: dict[int, Exception] = {}  # id in the program -> why it has no value
        self.precedent: Precedent | None = None

    def run(self, report: Report) -> Iterator[None]:
        """Run every call, then bind the outputs."""
        plan, meter, store = self._plan, self._meter, self._store
        meter.check_room("run", len(self._message.outs), 0)
        tally = _Tally(store, meter)
        tally.saw(self._given, self._slots)
        try:
            for number, call in enumerate(plan.calls):
                placed = self._placed(call)
                held, slots = store.held, len(store)
                try:
                    if self._failed:
                        self._meter.check_halted(placed)
                        self._check_read(call)
                    tally.add(*meter.call(placed), held, slots + len(call.outs))
                    tally.saw(call.outs, self._slots)
                    self._check_made(call)
                except Exception as error:  # whatever it is, it is an answer
                    tally.failed = True
                    failure: Exception = report(number, call, error)
                    self._failed.update((out, failure) for out in call.outs)
                for ref in plan.last.get(number, ()):
                    if ref in self._slots and ref not in self._given:  # else a number, or an input
                        self._drop(self._slots[ref])
                yield
            self._bind_outputs(report)
            self.precedent = tally.precedent(plan.calls)
        finally:
            for slot in self._bound.difference(self._message.outs):
                self._store.drop(slot)

    def _placed(self, call: Call) -> Call:
        """The call with slots for ids, fresh ones for what it makes."""
        outs = []
        for out in call.outs:
            if out != HOLE:
                slot = self._slots[out] = self._outs[out] if out in self._outs else next(self._ids)
                self._bound.add(slot)
                outs.append(slot)
            else:
                outs.append(HOLE)
        return replaced(call, self._arg, tuple(outs))

    def _arg(self, ref: Ref) -> Arg:
        return self._numbers[ref.id] if ref.id in self._numbers else Ref(self._slots[ref.id])

    def _check_read(self, call: Call) -> None:
        """Raise why an argument has no value."""
        for arg in (*call.args, *call.kwargs.values()):
            for ref in refs(arg):
                if ref in self._failed:
                    raise self._failed[ref]

    def _check_made(self, call: Call) -> None:
        """Note which results are none: whoever reads one fails."""
        for out in call.outs:
            if out != HOLE and self._slots[out] not in self._store:
                self._failed[out] = ProgramError(NONE)

    def _drop(self, slot: int) -> None:
        self._bound.discard(slot)
        self._store.drop(slot)

    def _bind_outputs(self, report: Report) -> None:
        """Outputs that are inputs, or twice the same: another slot for the same value."""
        store = self._store
        for (_, ref), out in zip(self._plan.program.outputs, self._message.outs, strict=True):
            slot, error = self._slots[ref], self._failed.get(ref)
            if isinstance(error, ProgramError):  # a result that is none
                number = next(at for at, call in enumerate(self._plan.calls) if ref in call.outs)
                error = report(number, self._plan.calls[number], error)
            if error is not None:
                self._meter.stand_in(out, error)
            elif slot in store and slot != out:
                store[out] = store[slot]
                if not isinstance(store[out], Exception):
                    store.count(out, store[out])
                    if store.label(out):
                        self._meter.history.same(slot, out, store)


class _Tally:
    """What the calls of one run took, made and were labelled."""

    def __init__(self, store: Store, meter: Meter) -> None:
        self._store, self._meter = store, meter
        self._held, self._had, self._spent = store.held, len(store), meter.spent
        self._most = self._flops = self._fresh = self._slots = 0
        self._labels: list[Label] = []
        self._specs: dict[int, Spec] = {}
        self._cells: dict[int, Cell] = {}
        self.failed = False

    def add(self, coming: Any, label: Label, held: int, slots: int) -> None:
        """A call was run: what was known of it before, what it read, what was held before it."""
        self._most, self._flops = max(self._most, coming.most), max(self._flops, coming.flops)
        self._fresh = max(self._fresh, held - self._held + coming.fresh)
        self._slots = max(self._slots, slots - self._had)
        self._labels.append(label)
        self.failed |= not coming.lasting

    def saw(self, ids: Any, slots: dict[int, int]) -> None:
        """These ids of the program are bound now."""
        for ref in ids:
            cell = self._store.cells.get(slots[ref]) if ref != HOLE else None
            if cell is None:  # a hole, or nothing of this session's
                self.failed |= ref != HOLE
            else:
                self._cells[ref], self._specs[ref] = cell, self._store.specs[slots[ref]]

    def precedent(self, calls: tuple[Call, ...]) -> Precedent | None:
        """All of it, if the next run would be like this one."""
        if self.failed or any(cell.failed for cell in self._cells.values()):
            return None
        numbers: dict[Cell, int] = {}
        cells = {ref: numbers.setdefault(cell, len(numbers)) for ref, cell in self._cells.items()}
        nbytes = {ref: cell.nbytes for ref, cell in self._cells.items()}
        after = {ref: cell.label for ref, cell in self._cells.items()}
        return Precedent(
            self._most, self._flops, self._fresh, self._slots, self._meter.spent - self._spent,
            tuple(self._labels), self._specs, cells, nbytes, after, _made(calls, self._labels, cells),
            self._store.drawn,
        )  # fmt: skip


def _made(calls: Iterable[Call], labels: Iterable[Label], cells: dict[int, int]) -> frozenset[int]:
    """Which storages the calls that have a label made, took views of or wrote to."""
    found: set[int] = set()
    for call, label in zip(calls, labels, strict=True):
        if label:
            found.update(cells[ref] for ref in (*call.outs, *written(call, operator(call.op))) if ref != HOLE)
    return frozenset(found)
