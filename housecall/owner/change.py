"""`Change`: what differs between two policies, in words, and whether it permits more; and what is loose in one.

What must live here: the order of every key, from tight to loose. What must not: files and keys. The comparison errs to
one side: what may permit anything more is called looser.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

import msgspec

from ..privacy import pipeline
from ..privacy.pipeline import Stage
from .policy import DENY, Policy, unpaid

__all__ = ["Change", "changes", "loosens", "warnings"]

_ROLES = ("scientist", "worker")  # whom an authority can invite; another role is nobody's
_MUCH_EPSILON = 10  # e^10 = 22,026: whoever guesses is right almost surely, so little is promised


class Change(msgspec.Struct, frozen=True):
    """One difference: the key, whether it `loosens`, and a sentence."""

    key: str
    loosens: bool
    text: str

    def __str__(self) -> str:
        return f"{'LOOSER' if self.loosens else 'tighter'}  {self.key}: {self.text}"


def changes(old: Policy, new: Policy) -> tuple[Change, ...]:
    """What `new` changes, key by key. If none of them loosens, `new` permits nothing that `old` refuses."""
    return tuple(_changes(old, new))


def loosens(old: Policy, new: Policy) -> tuple[str, ...]:
    """The changes that permit something more, in words. Empty: `new` permits nothing that `old` refuses."""
    return tuple(f"{change.key}: {change.text}" for change in changes(old, new) if change.loosens)


def _changes(old: Policy, new: Policy) -> Iterator[Change]:
    yield from _ends(old.expires, new.expires)
    for key in ("interactive", "plans", "statistics"):
        yield from _entries(f"use.{key}", getattr(old.use, key), getattr(new.use, key))
    yield from _entries("plans.digests", old.plans.digests, new.plans.digests)
    yield from _flag("plans.ask", old.plans.ask, new.plans.ask)
    yield from _entries("release.exact", old.release.exact, new.release.exact)
    yield from _flag("release.approvals", old.release.approvals, new.release.approvals)
    yield from _stages(old.release.update, new.release.update)
    yield from _flag("release.statistics", old.release.statistics, new.release.statistics)
    yield from _metrics(old, new)
    yield from _number("budget.epsilon", old.budget.epsilon, new.budget.epsilon)
    yield from _number("budget.delta", old.budget.delta, new.budget.delta)
    if old.budget.unit != new.budget.unit:  # all records of a person are more than one of them
        yield _from_to("budget.unit", old.budget.unit, new.budget.unit, loosens=new.budget.unit == "record")


def _ends(old: datetime | None, new: datetime | None) -> Iterator[Change]:
    if old != new:
        later = old is not None and (new is None or new > old)
        yield _from_to("expires", old or "never", new or "never", loosens=later)


def _entries(key: str, old: tuple[str, ...], new: tuple[str, ...]) -> Iterator[Change]:
    for entry in sorted(set(new) - set(old)):
        if not _covered(entry, old):
            yield Change(key, True, f"adds {entry}")
    for entry in sorted(set(old) - set(new)):
        if not _covered(entry, new):
            yield Change(key, False, f"removes {entry}")


def _covered(entry: str, entries: Iterable[str]) -> bool:
    """Whether what an entry names is named by the others."""
    role, slash, name = entry.rpartition("/")
    return not {"*", entry, *((name, f"{role}/*") if slash and name != "*" else ())}.isdisjoint(entries)


def _flag(key: str, old: bool, new: bool) -> Iterator[Change]:
    if old != new:
        yield _from_to(key, str(old).lower(), str(new).lower(), loosens=new)


def _number(key: str, old: float, new: float) -> Iterator[Change]:
    if old != new:
        yield _from_to(key, f"{old:g}", f"{new:g}", loosens=new > old)


def _stages(old: tuple[Stage, ...], new: tuple[Stage, ...]) -> Iterator[Change]:
    """No stages let nothing out; more of them after the same ones are tighter; any other change may let out more."""
    if old != new:
        tighter = not new or (bool(old) and new[: len(old)] == old)
        yield _from_to("release.update", _piped(old), _piped(new), loosens=not tighter)


def _metrics(old: Policy, new: Policy) -> Iterator[Change]:
    before, after = old.release.metrics, new.release.metrics
    if before.minimum != after.minimum:  # 0: none leave
        looser = after.minimum > 0 and (before.minimum == 0 or after.minimum < before.minimum)
        yield _from_to("release.metrics.minimum", before.minimum, after.minimum, loosens=looser)
    if before.noise != after.noise:
        # Without noise only accepted programs are scores; noise that no budget could pay for let nothing out.
        looser = after.noise < before.noise or not before.noise or before.epsilon > old.budget.epsilon
        yield _from_to("release.metrics.noise", before.noise, after.noise, loosens=looser)


def _from_to(key: str, old: Any, new: Any, *, loosens: bool) -> Change:
    return Change(key, loosens, f"{old} becomes {new}")


def _piped(stages: tuple[Stage, ...]) -> str:
    return pipeline.words(stages) or "no updates"


# -- what is loose in one policy ------------------------------------------------------------------------------


def warnings(policy: Policy, now: datetime) -> tuple[str, ...]:
    """What an owner may not have meant, in words: wide doors, rules without effect, an end that has come."""
    return tuple(_warnings(policy, now))


def _warnings(policy: Policy, now: datetime) -> Iterator[str]:
    if policy.expires is not None and policy.expires <= now:
        yield f"it ended at {policy.expires.isoformat(sep=' ', timespec='minutes')}: nothing is permitted"
    elif policy.expires is None and changes(DENY, policy):
        yield "it never ends: `expires` gives it a date"
    yield from _wide(policy)
    yield from _without_effect(policy)
    if policy.budget.epsilon > _MUCH_EPSILON:
        yield f"budget.epsilon = {policy.budget.epsilon:g} promises next to nothing; above {_MUCH_EPSILON} few do"


def _wide(policy: Policy) -> Iterator[str]:
    for key, entries in _who(policy):
        for entry in entries:
            role, _, name = entry.rpartition("/")
            if name == "*":
                whom = f"every {role}" if role else "whoever can connect"
                what = " take every value, records too" if key == "release.exact" else " use it"
                yield f'{key} has "{entry}": {whom} may{what}'
            if role and role not in _ROLES:
                yield f'{key} has "{entry}", and nobody is ever a "{role}": expected {" or ".join(_ROLES)}'
    if policy.use.plans and "*" in policy.plans.digests:
        yield 'plans.digests has "*": any program runs, and nobody has read it'
    if policy.release.update and not pipeline.rho(policy.release.update):
        yield "release.update has no noise: what an update tells of single records is up to whoever trains"
    if policy.release.metrics.minimum and not policy.release.metrics.noise:
        yield "release.metrics has no noise: means of a model's scores tell of single records, to who chooses the model"


def _without_effect(policy: Policy) -> Iterator[str]:
    use, release = policy.use, policy.release
    if release.exact and not (use.interactive or use.plans):
        yield "release.exact names somebody whom [use] lets do nothing: it has no effect"
    if use.plans and not policy.plans.digests and not policy.plans.ask:
        yield "use.plans names somebody, but [plans] accepts no program"
    if bool(use.statistics) != release.statistics:
        yield "statistics leave if use.statistics names somebody and release.statistics is true: one has no effect"
    elif release.statistics and not policy.budget.epsilon:
        yield "release.statistics has no effect: [budget] has no epsilon that a statistic could be paid from"
    noised = bool(pipeline.rho(release.update)), bool(release.metrics.minimum and release.metrics.noise)
    if release.update and not (use.interactive or use.plans):
        yield "release.update has no effect: [use] lets nobody make one"
    elif noised[0] and (refusal := unpaid(policy)):
        yield f"release.update has no effect: {refusal} cannot pay for the noise of one"
    if bool(release.metrics.minimum) != bool(use.plans) and (release.metrics.minimum or release.metrics.noise):
        yield "metrics leave if use.plans names somebody and release.metrics.minimum is not 0: one has no effect"
    elif noised[1] and release.metrics.epsilon > policy.budget.epsilon:
        yield "release.metrics has no effect: [budget] has too little epsilon to pay for the noise of one"
    if policy.budget.epsilon and not (use.statistics and release.statistics) and not any(noised):
        yield "[budget] pays for statistics, metrics and updates, and none leave: nothing spends from it"
    if policy.budget.delta and not noised[0]:
        yield "budget.delta is for updates with noise, and none leave: nothing needs it"


def _who(policy: Policy) -> Iterator[tuple[str, tuple[str, ...]]]:
    for key in ("interactive", "plans", "statistics"):
        yield f"use.{key}", getattr(policy.use, key)
    yield "release.exact", policy.release.exact
