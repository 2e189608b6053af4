"""Several calls that are issued together, as one: a loader's batch, or the whole backward of a loss.

The first time they are issued one by one, and the step before them remembers where that led. From then on, when the
same is to be said there of the same registers, the trace goes to the last of their steps at once: nothing passes
through torch's dispatcher, and what is made in between has no pointer here.

What must live here: how a phrase is learned, and how a trace takes it. What must not: when one may be said (`backward`,
`data`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .repeat import Result, pointer_to, result_of
from .session import Session, caller_again
from .trace import Step, Trace

__all__ = ["Phrase", "learned", "said"]


class Phrase(NamedTuple):
    """What was said after a step: `calls` calls, of which `end` is the last, with these `numbers`. `makes` has what the
    caller is given of each value that they bind, or `None`, and `gives` which of those are the results, in order."""

    calls: int
    end: Step
    numbers: list[float]
    makes: tuple[Result | None, ...]
    gives: tuple[int, ...]


def said(session: Session, trace: Trace, phrase: Phrase) -> list[Any]:
    """Take the steps of a phrase in the session's present trace, which is at the step before it and has room for it;
    pointers to its results. To be called with the session's lock."""
    try:
        trace.step = phrase.end
        trace.sites += [caller_again(phrase.end)] * phrase.calls
        trace.numbers += phrase.numbers
        found: list[Any] = []
        for result in phrase.makes:
            if result is None:
                trace.pass_over(next(session.ids))
                found.append(None)
            else:
                found.append(pointer_to(session, trace, result, 0))
        trace.room -= phrase.calls
        return [found[at] for at in phrase.gives]
    except BaseException:  # Ctrl-C, in the middle of it
        session.mend()
        raise


def learned(cls: Any, trace: Trace, here: Step, results: list[Any]) -> Phrase | None:
    """The phrase that was said since the trace was at the step `here`, of which these pointers are the results; `None`
    if it cannot be said again: it used what the trace had not used before, or did not give new values."""
    steps = 0
    step: Step | None = trace.step
    while step is not here:
        if step is None or step.call is None:
            return None
        step, steps = step.before, steps + 1
    first, end = here.counts[0], trace.step
    if not steps:
        return None
    makes: list[Result | None] = [None] * (end.counts[0] - first)
    gives: list[int] = []
    for pointer in results:
        if type(pointer) is not cls:
            return None
        slot = pointer._slot
        if slot.trace is not trace or slot.skip or slot.register.id <= first:
            return None
        at = slot.register.id - 1 - first
        if makes[at] is not None:
            return None
        makes[at] = result_of(cls, slot.register, slot.spec)
        gives.append(at)
    return Phrase(steps, end, trace.numbers[here.counts[2] :], tuple(makes), tuple(gives))
