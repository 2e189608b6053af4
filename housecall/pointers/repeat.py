"""A call that is issued once more: recognised by what it is given, without a key, a type or a call being made.

A loop issues the same calls in the same order, batch after batch. So a step of the trace remembers which call followed
it last (`Step.next`), and the step of that has a `Pattern`: what its call is given. To hold a call against it takes a
few looks. What is not the call that was expected goes to `calls`, which is slower, and the plain twin of this.

What must live here: whether a call is the expected one, and how its step is taken then. What must not: typing, and
steps that are not in the tree yet.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..program.ops import Return
from ..program.outcome import Spec
from ..types import Ref
from .session import Cut, Session
from .site import caller_again
from .slot import Slot
from .trace import Step, Trace, register

if TYPE_CHECKING:
    from .calls import Rule

__all__ = ["Pattern", "Result", "again", "pattern_of", "point", "pointer_to", "result_of"]

_make: Any = torch.Tensor._make_wrapper_subclass
_no_memory: Any = torch._C._set_throw_on_mutable_data_ptr  # whoever reaches for it in C gets an error, not a crash
_default_dtype = torch.get_default_dtype
_is_recorded = torch.is_grad_enabled
_weakly = weakref.ref
_new = object.__new__

# Constants that are the same if their types are and they are equal. Floats are not among them: 0.0 equals -0.0.
_CONSTANTS = frozenset((int, bool, str, torch.dtype, torch.device, torch.layout, torch.memory_format))

# One new pointer that a call gives: its slot's register, type, and bytes that come before it, and how torch makes it.
Result = tuple[Ref, Spec, int, tuple[Any, ...]]


class Pattern(NamedTuple):
    """What the call of a step is given: positional arguments first, then those by name.

    `types` are the types of all of them, `names` the names of the last. `pointers` says which are in which registers,
    `constants` what `pick` gives of the others, `numbers` which are numbers of the trace. The call gives back the
    argument at `same`, or `results`, or the `single` one of them, not in a tuple; they may share the storage of the
    argument at `view`. `function` is torch's operator, `None` if it takes more than looks to tell a call by this."""

    function: Any
    types: tuple[type, ...] = ()
    names: tuple[str, ...] = ()
    pointers: tuple[tuple[int, Ref], ...] = ()
    pick: Callable[[Sequence[Any]], Any] | None = None
    constants: Any = None
    numbers: tuple[int, ...] = ()
    results: tuple[Result | None, ...] = ()
    single: Result | None = None
    same: int = -1
    view: int = -1


_NEVER = Pattern(None)


def pattern_of(cls: Any, rule: Rule, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pattern:
    """The pattern of a step that was just taken by a call with these arguments."""
    if rule.random:  # which may seed the worker first
        return _NEVER
    given = step.given.results
    values, names = (*args, *kwargs.values()), [*rule.params[: len(args)], *kwargs]
    back = len(given) == 1 and isinstance(given[0], Return) and not given[0].many
    if not back and not (given and all(one is None or isinstance(one, Spec) for one in given)):
        return _NEVER
    pointers, constants, numbers = [], [], []
    for at, (name, value) in enumerate(zip(names, values, strict=True)):
        kind = type(value)
        if kind is cls:
            pointers.append((at, value._slot.register))
        elif kind is float and rule.by_name[name]:
            numbers.append(at)
        elif kind in _CONSTANTS or (kind is list and rule.kinds[name] in ("int", "bool")):
            constants.append(at)
        elif value is not None:
            return _NEVER
    pick = itemgetter(*constants) if constants else None
    results = () if back else _results(cls, step, given)
    return Pattern(
        rule.function, tuple(map(type, values)), tuple(kwargs), tuple(pointers), pick, pick and pick(values),
        tuple(numbers), results, results[0] if len(results) == 1 else None,
        names.index(given[0].same_as) if back else -1, names.index(rule.params[rule.view]) if rule.view >= 0 else -1,
    )  # fmt: skip


def _results(cls: Any, step: Step, given: tuple[Spec | None, ...]) -> tuple[Result | None, ...]:
    """What a step's call gives, in registers from the step's first on."""
    assert step.before is not None
    at = step.before.counts[0]
    found: list[Result | None] = []
    for spec in given:
        found.append(None if spec is None else result_of(cls, register(at), spec))
        at += spec is not None
    return tuple(found)


def result_of(cls: Any, at: Ref, spec: Spec) -> Result:
    """How a pointer to a value of this type in this register is made."""
    return at, spec.start, spec.skip, (cls, *spec.start.wrapper)


def again(cls: Any, session: Session, expected: Step, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    """If a call of the expected step's function is that of the step, take it: the result. Otherwise `None`, and nothing
    is done that the call would not do in any case."""
    _, types, names, pointers, pick, constants, numbers, results, single, same, view = expected.pattern
    values: Any = args
    if kwargs:
        if tuple(kwargs) != names:
            return None
        values = (*args, *kwargs.values())
    elif names:
        return None
    if tuple(map(type, values)) != types or _default_dtype() is not torch.float32:
        return None
    if pick is not None and pick(values) != constants:
        return None
    recorded = _is_recorded()  # in autograd's graph, or may be
    with session.lock:
        try:
            trace = session.trace
            session.note(trace)
            for at, wanted in pointers:
                slot = values[at]._slot
                if slot.trace is not trace:
                    if slot.session is not session:
                        return None
                    session.take(slot)
                if slot.register is not wanted:
                    return None
                if recorded and slot.taken and not values[at].is_leaf:
                    trace.reaches_back = True
            if trace.step is not expected.before:
                return None
            trace.step = expected
            trace.sites.append(caller_again(expected))
            for at in numbers:
                trace.numbers.append(values[at])
            skip = values[view]._slot.skip if view >= 0 else 0
            if single is not None:
                found = pointer_to(session, trace, single, skip)
            elif same >= 0:
                found = values[same]
            else:
                found = tuple([result and pointer_to(session, trace, result, skip) for result in results])
            trace.room -= 1
            if trace.room <= 0:
                session.full()
            return found
        except Cut:  # what is taken now is asked for once more
            return None
        except BaseException:  # Ctrl-C, in the middle of a step
            session.mend()
            raise


def pointer_to(session: Session, trace: Trace, result: Result, skip: int) -> Any:
    """A pointer to a new result: `point(Slot(...))`, and what that looks up is there."""
    slot = _new(Slot)
    slot.session, slot.trace = session, trace
    slot.register, slot.spec, more, wrapper = result
    slot.skip = skip = skip + more
    slot.taken = False
    slot.id = ref = next(session.ids)
    trace.made.append(_weakly(slot))
    trace.ids.append(ref)
    if skip or slot.spec.bits:
        return point(wrapper[0], slot)
    pointer = _make(*wrapper)
    pointer._slot = slot
    _no_memory(pointer)
    return pointer


def point(cls: Any, slot: Slot) -> Any:
    """A new pointer to a slot."""
    given = slot.spec
    if slot.skip:
        offset = slot.skip // given.dtype.itemsize
        pointer = _make(cls, given.size, given.stride, offset, None, given.dtype, torch.strided, given.device)
    else:
        pointer = _make(cls, *given.wrapper)
    pointer._slot = slot
    _no_memory(pointer)
    if given.bits:
        torch._C._set_conj(pointer, given.type.conj)
        torch._C._set_neg(pointer, given.type.neg)
    return pointer
