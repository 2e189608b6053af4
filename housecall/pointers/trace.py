"""Traces: what a session has issued since its last frame left, as steps over registers, in a tree of all steps seen.

A training loop says the same calls batch after batch, only of other slots. So a call is looked up before it is made. A
*trace* walks down a *tree*: each step is an input or a call, and the next is found by what decides it (its operator,
registers in place of slots, all other arguments). A step that was seen before costs one look-up: it is not typed, built
or encoded again. And where a trace ends as others have ended, with the same values still pointed at, it leaves as one
`Run` of a program that the worker has, in place of its calls.

What must live here: the tree, the walk, and what a trace is as calls or as a program. What must not: torch, messages.

NOTE [Registers]
A trace numbers its values from 1: an input when a call first uses it, a result when it is issued. The same steps thus
mean the same program, whichever slots the registers stand for today.

NOTE [Numbers]
Floats do not decide a step where they may be numbers of a program: a learning rate, or Adam's step size, changes from
batch to batch. A step's call has `NUMBER` in their places, and the trace keeps their values in order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

from ..errors import ProgramError
from ..program.call import HOLE, Arg, Call, Input, Items, Program, refs, replaced
from ..program.check import check
from ..program.flow import with_updates
from ..types import Ref, TensorType

__all__ = ["NUMBER", "Ending", "Step", "Trace", "Tree", "register"]

NUMBER: Final = Ref(0)  # in a step's call: the next of the trace's numbers
SEEN = 2  # how often traces end alike before they become a program
MOST_PROGRAMS = 64  # of one session: its worker keeps 256, and recorded ones need room
MOST_STEPS = 1 << 14  # of one tree, and endings: beyond, it begins anew

_NUMBERS = 1 << 32  # where the ids of a program's numbers begin, beyond all registers
_registers: list[Ref] = []


def register(index: int) -> Ref:
    """The register of the value of this index in a trace, from 0: the same object each time."""
    if index < len(_registers):
        return _registers[index]
    while index >= len(_registers):
        _registers.append(Ref(len(_registers) + 1))
    return _registers[index]


class Step:
    """A node of the tree: an input of a type, or a call over registers; the root is neither.

    `given` says what the call gives, for whoever issues it, and `site` from where it was issued last; `after` has the
    steps that followed, by what decided them, `next` the call that followed last, perhaps after inputs, and `pattern`
    what tells its own call from others (`repeat`), `phrase` what was last said here in several calls (`phrase`) and
    `backward` what the backward of a loss made here said (`backward`).
    `endings` has how traces ended here, by the registers still pointed at."""

    __slots__ = (
        "after", "backward", "before", "call", "counts", "endings", "given", "inputs", "next", "pattern", "phrase",
        "site", "type",
    )  # fmt: skip

    def __init__(self, before: Step | None, type: TensorType | None, call: Call | None, given: Any) -> None:
        self.before, self.type, self.call, self.given = before, type, call, given
        self.site: Any = None
        self.next: Step | None = None
        self.pattern: Any = None
        self.phrase: Any = None
        self.backward: Any = None
        values, calls, numbers = before.counts if before else (0, 0, 0)
        self.inputs: tuple[int, ...] = before.inputs if before else ()  # the registers of all inputs so far
        if type is not None:
            self.inputs += (values,)
        if call is not None:
            values += sum(out != HOLE for out in call.outs)
            numbers += sum(ref is NUMBER for arg in (*call.args, *call.kwargs.values()) for ref in _all(arg))
        self.counts: tuple[int, int, int] = (  # of values, calls and numbers, after it
            values + (type is not None), calls + (call is not None), numbers,
        )  # fmt: skip
        self.after: dict[Any, Step] = {}
        self.endings: dict[tuple[int, ...], Ending] = {}

    def path(self) -> list[Step]:
        """The steps from the first to this one."""
        found: list[Step] = []
        step = self
        while step.before is not None:
            found.append(step)
            step = step.before
        return found[::-1]


def _nobody() -> None:
    """What a weak reference gives whose object is gone."""


def _all(arg: Arg) -> list[Ref]:
    """The references in an argument."""
    if isinstance(arg, Items):
        return [ref for item in arg.items for ref in _all(item)]
    return [arg] if isinstance(arg, Ref) else []


class Ending(NamedTuple):
    """How traces ended at a step: how often so far, and the program that they are from now on."""

    times: int
    program: Program | None = None
    digest: str = ""


class Tree:
    """All steps that one session has seen."""

    def __init__(self) -> None:
        self.root = Step(None, None, None, None)
        self._size = 0  # steps and endings
        self._programs: set[str] = set()  # digests: those of a tree that was given up are met again

    def add(
        self, before: Step, key: Any, *, type: TensorType | None = None, call: Call | None = None, given: Any = None
    ) -> Step:
        """A step that was not seen before."""
        self._grow()
        step = before.after[key] = Step(before, type, call, given)
        return step

    def _grow(self) -> None:
        if self._size >= MOST_STEPS:
            self.root = Step(None, None, None, None)
            self._size = 0
        self._size += 1

    def ending(self, step: Step, alive: tuple[int, ...]) -> Ending:
        """A trace ends at this step; `alive` are the registers of results that are still pointed at."""
        known = step.endings.get(alive)
        if known is not None and known.program is not None:
            return known
        if known is None:
            self._grow()
        times = known.times + 1 if known else 1
        found = Ending(times)
        program = program_of(step, alive) if times == SEEN + 1 else None
        if program is not None and self._may_have(program.digest):
            self._programs.add(program.digest)
            found = Ending(times, program, program.digest)
        step.endings[alive] = found
        return found

    def _may_have(self, digest: str) -> bool:
        return digest in self._programs or len(self._programs) < MOST_PROGRAMS


class Trace:
    """A walk down a tree: `step` is where it stands, `ids` are the slots of its registers, `made` weak references to
    those that are results, `numbers` the floats of its calls, `sites` the lines that issued them. `room`: how many
    calls it should still take. `reaches_back`: whether autograd's graph of what it made goes on in an earlier trace;
    `watched`: whether somebody has put a hook there."""

    __slots__ = ("ids", "made", "numbers", "reaches_back", "room", "sites", "step", "tree", "watched")

    def __init__(self, tree: Tree, room: int) -> None:
        self.tree, self.step, self.room = tree, tree.root, room
        self.ids: list[int] = []
        self.made: list[Callable[[], Any]] = []
        self.numbers: list[float] = []
        self.reaches_back = self.watched = False
        self.sites: list[Any] = []

    def take(self, id: int, spec: Any) -> Ref:
        """Make a slot of before an input; its register. `spec` stands for its type, which it has as `.type`."""
        step = self.step.after.get(spec)
        if step is None:
            step = self.tree.add(self.step, spec, type=spec.type)
        self.step = step
        at = len(self.ids)
        self.ids.append(id)
        return register(at)

    def make(self, slot: Any) -> Ref:
        """Make a new slot the next result; its register."""
        self.made.append(weakref.ref(slot))
        at = len(self.ids)
        self.ids.append(slot.id)
        return register(at)

    def pass_over(self, ids: Iterable[int], count: int) -> None:
        """So many next results are for nobody: they have ids, and no slots."""
        self.made += [_nobody] * count
        self.ids += ids

    def is_whole(self) -> bool:
        """Whether no step was cut short."""
        return self.step.counts == (len(self.ids), len(self.sites), len(self.numbers))

    def rewind(self) -> None:
        """Back to the last step that was whole."""
        have = len(self.ids), len(self.sites), len(self.numbers)
        step = self.step
        while step.before is not None and any(wanted > found for wanted, found in zip(step.counts, have, strict=True)):
            step = step.before
        values, calls, numbers = step.counts
        self.step = step
        del self.ids[values:], self.made[values - len(step.inputs) :], self.sites[calls:], self.numbers[numbers:]

    def end(self) -> list[Any]:
        """The slots of results that somebody still points at, in order. It is asked once, when the trace ends."""
        alive = [slot for slot in [made() for made in self.made] if slot is not None]
        self.made.clear()  # a slot refers to the last trace that used it for as long as it lives
        return alive

    def calls(self) -> list[Call]:
        """Its calls, over slots."""
        ids, numbers, bound = self.ids, iter(self.numbers), 0
        found = []
        for step in self.step.path():
            if step.call is None:
                bound += 1
                continue
            outs = []
            for out in step.call.outs:
                outs.append(HOLE if out == HOLE else ids[bound])
                bound += out != HOLE
            found.append(self.over_slots(step.call, numbers, tuple(outs)))
        return found

    def over_slots(self, call: Call, numbers: Iterator[float], outs: tuple[int, ...]) -> Call:
        """A call over registers with slots in their places, and the next of the numbers."""
        return replaced(call, lambda ref: next(numbers) if ref is NUMBER else Ref(self.ids[ref.id - 1]), outs)


def freed(calls: list[Call], dead: set[int]) -> Iterator[tuple[Call, tuple[int, ...]]]:
    """Calls over slots, each with the slots among the dead that no later one reads."""
    last: dict[int, int] = {}
    for number, call in enumerate(calls):
        used = [ref for arg in (*call.args, *call.kwargs.values()) for ref in refs(arg)]
        last.update((ref, number) for ref in (*used, *call.outs) if ref in dead)
    after: dict[int, list[int]] = {}
    for ref, number in last.items():
        after.setdefault(number, []).append(ref)
    for number, call in enumerate(calls):
        yield call, tuple(after.get(number, ()))


def program_of(step: Step, alive: tuple[int, ...]) -> Program | None:
    """The program of all steps to this one, whose outputs are the registers alive; `None` if it may not be one (a call
    that resizes an input, say)."""
    inputs: list[Input] = []
    calls: list[Call] = []
    numbers: list[tuple[str, int]] = []
    bound = 0

    def placed(ref: Ref) -> Ref:
        if ref is not NUMBER:
            return ref
        numbers.append((f"n{len(numbers) + 1}", _NUMBERS + len(numbers)))
        return Ref(numbers[-1][1])

    for one in step.path():
        if one.type is not None:
            bound += 1
            inputs.append(Input(f"x{bound}", bound, one.type))
        elif one.call is not None:
            outs = []
            for out in one.call.outs:
                bound += out != HOLE
                outs.append(bound if out != HOLE else HOLE)
            calls.append(replaced(one.call, placed, tuple(outs)))
    outputs = tuple([(f"y{number}", at + 1) for number, at in enumerate(alive, 1)])
    program = with_updates(Program(tuple(inputs), tuple(calls), outputs, tuple(numbers)))
    try:
        check(program)
    except ProgramError:
        return None
    return program
