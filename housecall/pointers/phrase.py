"""Several calls that are issued together, as one: the layers of a chain, or the whole backward of a loss.

The first time they are issued one by one, and the step before them remembers where that led. From then on, when the
same is to be said there of the same registers, the trace goes to the last of their steps at once: nothing passes
through torch's dispatcher, and what is made in between has no pointer here.

What must live here: how a phrase is learned, and how a trace takes it. What must not: when one may be said (`backward`,
`chain`).

NOTE [Views]
Where in its storage a view begins depends on its base, and registers do not say that. So a result that is a view of
what the trace had before is learned only where all that was given begins at its storage's start, as it must when it is
said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice, pairwise
from typing import Any, NamedTuple

from ..program.call import refs
from ..program.check import arguments
from ..program.ops import operator
from ..types import Ref
from .repeat import Result, point, pointer_to, result_of
from .session import Cut, Session
from .site import caller_again
from .slot import Slot
from .trace import Step, Trace

__all__ = ["Phrase", "learned", "said", "say"]


class Phrase(NamedTuple):
    """What was said after a step: `calls` calls, of which `end` is the last, with these `numbers`. `makes` has how many
    values they bind that the caller is not given, and the next that she is; behind them `rest` more. `gives` says which
    of those are the results, in order."""

    calls: int
    end: Step
    numbers: list[float]
    makes: tuple[tuple[int, Result], ...]
    rest: int
    gives: tuple[int, ...]


def said(session: Session, trace: Trace, phrase: Phrase) -> list[Any]:
    """Take the steps of a phrase in the session's present trace, which is at the step before it and has room for it;
    pointers to its results. To be called with the session's lock."""
    try:
        trace.step = phrase.end
        trace.sites += [caller_again(phrase.end)] * phrase.calls
        trace.numbers += phrase.numbers
        found: list[Any] = []
        for hidden, result in phrase.makes:
            if hidden:
                trace.pass_over(islice(session.ids, hidden), hidden)
            found.append(pointer_to(session, trace, result, 0))
        trace.pass_over(islice(session.ids, phrase.rest), phrase.rest)
        trace.room -= phrase.calls
        return [found[at] for at in phrase.gives]
    except BaseException:  # Ctrl-C, in the middle of it
        session.mend()
        raise


def say(
    cls: Any, session: Session, what: Any, act: Callable[..., Sequence[Any]], pointers: tuple[Any, ...]
) -> Sequence[Any]:
    """`act(*pointers)`: new pointers, each once. `what` decides what it says of given registers. A slot may stand for a
    pointer, which is made if it is needed."""
    with session.lock:
        trace = session.trace
        session.note(trace)
        registers = _registers(session, trace, pointers)
        here = trace.step
        known = here.phrase
        if known is not None and known[0] is what and known[1] == registers and trace.room > known[2].calls:
            return said(session, trace, known[2])
        results = act(*[point(cls, one) if type(one) is Slot else one for one in pointers])
        if registers is not None and session.trace is trace:
            phrase = learned(cls, trace, here, results, views=True)
            here.phrase = phrase and (what, registers, phrase)
        return results


def _registers(session: Session, trace: Trace, pointers: tuple[Any, ...]) -> list[Ref] | None:
    """The registers that these pointers have in the present trace, which takes what it has not taken yet; `None` if it
    cannot, or if one begins within its storage: see NOTE [Views]."""
    found = []
    try:
        for pointer in pointers:
            slot = pointer if type(pointer) is Slot else pointer._slot
            if slot.trace is not trace:
                if slot.session is not session:
                    return None
                session.take(slot)
            if slot.taken and slot is not pointer and not pointer.is_leaf:
                trace.reaches_back = True
            if slot.skip:
                return None
            found.append(slot.register)
    except Cut:  # the call that uses it will see to that
        return None
    return found


def learned(cls: Any, trace: Trace, here: Step, results: Sequence[Any], *, views: bool = False) -> Phrase | None:
    """The phrase that was said since the trace was at the step `here`, of which these pointers are the results; `None`
    if it cannot be said again: it used what the trace had not used before, or drew, or did not give new values.
    `views`: whether they may be views of what was there before; see NOTE [Views]."""
    steps: list[Step] = []
    step: Step | None = trace.step
    while step is not here:
        if step is None or step.call is None or operator(step.call.op).random:
            return None
        steps.append(step)
        step = step.before
    first, end = here.counts[0], trace.step
    if not steps:
        return None
    inner = _inner_views(steps[::-1], first)
    found: dict[int, Result] = {}
    for pointer in results:
        if type(pointer) is not cls:
            return None
        slot = pointer._slot
        if slot.trace is not trace or slot.skip or slot.register.id <= first:
            return None
        if slot.register.id in found or (slot.register.id in inner and not views):
            return None
        found[slot.register.id] = result_of(cls, slot.register, slot.spec)
    given = sorted(found)
    hidden = [at - before - 1 for before, at in pairwise([first, *given])]
    makes = tuple(zip(hidden, [found[at] for at in given], strict=True))
    gives = tuple([given.index(at) for at in found])
    rest = end.counts[0] - max([first, *given])
    return Phrase(len(steps), end, trace.numbers[here.counts[2] :], makes, rest, gives)


def _inner_views(steps: list[Step], first: int) -> set[int]:
    """The values made by these steps that share a storage with one of the `first` values."""
    found: set[int] = set()
    at = first
    for step in steps:
        assert step.call is not None
        rules = operator(step.call.op)
        named = {param.name: arg for param, arg in arguments(rules, step.call)}
        bases = [ref for given in rules.returns if given.view_of for ref in refs(named.get(given.view_of))]
        made = range(at + 1, step.counts[0] + 1)
        at = step.counts[0]
        if any(base <= first or base in found for base in bases):
            found.update(made)
    return found
