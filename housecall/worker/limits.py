"""What one session may use of the machine, and the meter that refuses more: before it runs, not by dying of it.

What must live here: the limits, and every decision to refuse for the sake of one. What must not: what a call takes
(`program.forecast`), whose memory a slot is (`store`).

NOTE [What is refused]
- a call whose results, or anything that it makes on the way, need more than `call_bytes`, or more than the session may
  still hold, or more slots;
- one that goes through more than `call_bytes` of elements of one input, each counted as often as `expand` repeats it,
  or needs more than `call_flops`: an operator that runs cannot be stopped, and others wait for it;
- one that would change the size of a value in place, as `t_` and an `out=` of another shape do;
- one that cannot be sized before it runs;
- one that binds an id that is bound, or writes to what the owner lends;
- any, when the session's computing time is used up; what is there can still be fetched.
What a kernel takes for itself while it runs (a work space, a copy of an input that is not contiguous) is not seen: it
is of the size of its inputs and results, but for the operators that `program.bounds` lists.

The table of forecasts belongs to one session: shared, the time of a look-up would tell one of another's work.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from ..errors import LimitError, ProgramError
from ..program.call import HOLE, Arg, Call, Complex, Items
from ..program.check import arguments
from ..program.forecast import WRAPS, Forecast, forecast
from ..program.ops import Operator, operator
from ..program.outcome import Spec, by_kind, spec_of
from ..program.run import Randomness, arguments_of, execute, value_of
from ..program.trust import check_values, trusts_values
from ..types import PUBLIC, Label, Ref
from ..wire.messages import Found, Put, Tag
from .history import History
from .private import check_made, check_private, run_private
from .store import Halt, Store

__all__ = ["UNLIMITED", "Limits", "Meter"]


class Limits(msgspec.Struct, frozen=True):
    """What one session may use: bytes, slots, operations, seconds of computing. `None` is no limit.

    `call_bytes` is for what one call makes or goes through, `reply_bytes` for what one reply carries."""

    session_bytes: int | None = 4_000_000_000
    slots: int | None = 100_000
    call_bytes: int | None = 2_000_000_000
    call_flops: int | None = 2_000_000_000_000
    compute_s: float | None = 86_400.0
    reply_bytes: int | None = 4_000_000_000


UNLIMITED = Limits(None, None, None, None, None, None)

TEXT = 2_000  # characters of a reason, or of a slot's tags and description
QUESTIONS = 1 << 16  # ids in one message
ENTRY = 300  # bytes that anything takes in a reply besides its elements
_TABLE = 1 << 12  # forecasts that a session keeps
_LONGEST_KEY = 1 << 10
_PLAIN = frozenset((bool, type(None), str))


class Meter:
    """One session's use of the machine against its limits. `clock` gives seconds, and only goes forward."""

    def __init__(
        self,
        limits: Limits,
        store: Store,
        randomness: Randomness,
        clock: Callable[[], float],
        halt: Halt | None = None,
    ) -> None:
        self.limits, self.clock = limits, clock
        self._halt = Halt() if halt is None else halt
        self.spent = 0.0
        self.history = History()
        self.may_use: Callable[[Label], None] | None = None  # asked before private data is read: `gate.Uses`
        self._store, self._randomness = store, randomness
        self._forecasts: dict[tuple[Any, ...], Forecast] = {}
        self._leaving = 0
        self._session_bytes = _number(limits.session_bytes)
        self._slots = _number(limits.slots)
        self._call_bytes = _number(limits.call_bytes)
        self._call_flops = _number(limits.call_flops)
        self._compute_s = _number(limits.compute_s)
        self._reply_bytes = _number(limits.reply_bytes)

    # -- calls --------------------------------------------------------------------------------------------

    def call(self, call: Call) -> tuple[Forecast, Label]:
        """Run a call, or refuse it: `LimitError` for what it takes, `ProgramError` for what it says. Returns what was
        known of it beforehand, and the label of what it read."""
        store, outs = self._store, call.outs
        self.check_halted(call)
        label, failed = store.read_by(call) if store.private else (PUBLIC, False)
        if label:
            if self.may_use is not None:
                self.may_use(label)
            check_private(call, label, store)
        coming = self._forecast(call)
        if label:
            check_made(call, label, coming.made)
        if (
            coming.most > self._call_bytes
            or coming.flops > self._call_flops
            or store.held + coming.fresh > self._session_bytes
            or len(store) + len(outs) > self._slots
            or self.spent >= self._compute_s
        ):
            raise self._refusal(call, coming)
        if len(outs) == 1:
            if outs[0] in store or outs[0] < HOLE:
                raise _bound(outs[0])
        elif outs:
            _check_new(outs, store)
        if _rule(call.op).writes:
            store.write(call)
        if label:
            run_private(call, coming.made or (), label, failed, store, self._randomness, self.history)
            return coming, label
        if _rule(call.op).trusts:
            check_values(call.op, arguments_of(call, store))
        execute(call, store, self._randomness)
        if coming.single is not None:
            self._count(outs[0], coming)
        else:
            for out in outs:
                if out in store:  # else a hole
                    store.count(out, store[out])
        return coming, label

    def check_halted(self, call: Call) -> None:
        """Refuse a call that would change something in place after a failure of which the caller has not heard."""
        if self._halt.cause is not None:
            self._halt.check(call)

    def allows(self, most: int, flops: int, fresh: int, slots: int, seconds: float) -> bool:
        """Whether a run that takes so much at most, and so much more than is held, is within the limits."""
        return (
            most <= self._call_bytes
            and flops <= self._call_flops
            and self._store.held + fresh <= self._session_bytes
            and len(self._store) + slots <= self._slots
            and self.spent + seconds < self._compute_s
        )

    def _count(self, out: int, coming: Forecast) -> None:
        if out == HOLE:
            self._store.pop(HOLE)
        else:
            self._store.count(out, self._store[out], coming.single)

    def _forecast(self, call: Call) -> Forecast:
        try:
            key = self._key(call)
        except KeyError:
            raise self._absent(call) from None
        known = self._forecasts.get(key)
        if known is not None:
            return known
        coming = forecast(call, self._store, self._call_bytes, self._call_flops)
        if len(self._forecasts) >= _TABLE:
            self._forecasts.clear()
        if coming.lasting and sum(len(part) if type(part) is str else 1 for part in key) <= _LONGEST_KEY:
            self._forecasts[key] = coming
        return coming

    def _key(self, call: Call) -> tuple[Any, ...]:
        """What decides what a call takes: its operator, the types of its inputs, its other arguments. `KeyError` if
        an input is not there."""
        rule = _rule(call.op)
        specs, kinds, args = self._store.specs, rule.kinds, call.args
        if len(args) > len(kinds):
            arguments(rule.operator, call)  # which says so
        key: list[Any] = [rule, len(args)]
        for index, arg in enumerate(args):
            kind = type(arg)
            if kind is Ref:
                key.append(specs[arg.id])  # type: ignore[union-attr]  # `kind` says it is a Ref
            elif kind is int or kind is float:
                key.append(kind if kinds[index] else arg)
            elif kind in _PLAIN:
                key.append(arg)
            else:
                self._part(arg, key, kinds[index])
        for name, arg in call.kwargs.items():
            key.append(name)
            self._part(arg, key, rule.by_name.get(name, False))
        return tuple(key)

    def _part(self, arg: Arg, key: list[Any], numbers: bool) -> None:
        kind = type(arg)
        if kind is Ref:
            key.append(self._store.specs[arg.id])  # type: ignore[union-attr]  # `kind` says it is a Ref
        elif kind is Items:
            key.append(Items)
            key.append(len(arg.items))  # type: ignore[union-attr]  # as above
            for item in arg.items:  # type: ignore[union-attr]  # as above
                self._part(item, key, False)
        elif numbers and kind in (int, float, Complex):
            key.append(kind)
        else:
            key.append(arg)

    def _absent(self, call: Call) -> Exception:
        """The error for a call that reads what is not there: the failure that stands there, or that nothing does."""
        try:
            value_of(Items((*call.args, *call.kwargs.values())), self._store)
        except Exception as error:  # whatever the store says of it
            return error
        return ProgramError(f"{call.op}: an argument is no value of this session")

    def _late(self, name: str) -> LimitError:
        return LimitError(
            f"{name} was not run: this session has used up its {self.limits.compute_s:,g} s of computing time; what it "
            "holds can still be fetched"
        )

    def _refusal(self, call: Call, coming: Forecast) -> LimitError:
        name, store, limits = call.op, self._store, self.limits
        if self.spent >= self._compute_s:
            return self._late(name)
        if coming.flops > self._call_flops:
            return LimitError(
                f"{name} would take some {coming.flops:.1e} operations, and one call may take {limits.call_flops:.1e}: "
                "do it in parts"
            )
        if coming.most > self._call_bytes:
            return LimitError(
                f"{name} would make or go through {coming.most:,} bytes, and one call may {limits.call_bytes:,}: do it "
                "in parts"
            )
        if len(store) + len(call.outs) > self._slots:
            return self._no_slots(name)
        return self._no_bytes(name, coming.fresh)

    def _no_slots(self, name: str) -> LimitError:
        return LimitError(
            f"{name} needs a slot: this session holds {len(self._store):,} of the {self.limits.slots:,} that it may; "
            "let go of tensors that you no longer need"
        )

    def _no_bytes(self, name: str, nbytes: int) -> LimitError:
        return LimitError(
            f"{name} would make {nbytes:,} bytes: this session holds {self._store.held:,} of the "
            f"{self.limits.session_bytes:,} that it may; let go of tensors that you no longer need"
        )

    # -- other messages -----------------------------------------------------------------------------------

    def put(self, message: Put) -> None:
        """Store a tensor that came, or refuse it."""
        store, ref, value = self._store, message.id, message.value.data
        if ref in store or ref <= HOLE:
            raise _bound(ref)
        self.check_room("put", 1, value.untyped_storage().nbytes())
        given = spec_of(value)
        if given.volume >= WRAPS:
            raise LimitError(f"put: {given.type} has more elements than can be counted")
        store[ref] = value
        store.count(ref, value, given)

    def check_room(self, what: str, slots: int, nbytes: int) -> None:
        """Refuse what has no place in this session: so many more slots, so many more bytes."""
        if len(self._store) + slots > self._slots:
            raise self._no_slots(what)
        if self._store.held + nbytes > self._session_bytes:
            raise self._no_bytes(what, nbytes)

    def check_tag(self, message: Tag) -> None:
        """Refuse a tag that is longer than any honest one."""
        if len(message.description) + sum(map(len, message.tags)) + len(message.tags) > TEXT:
            raise LimitError(f"the tags and description of a slot may have {TEXT:,} characters together")

    def check_question(self, ids: tuple[int, ...]) -> None:
        """Refuse a question about more slots than any honest one."""
        if len(ids) > QUESTIONS:
            raise LimitError(f"a message asks for {len(ids):,} slots, and may ask for {QUESTIONS:,}: ask in parts")
        self._leaves("the answer", ENTRY * len(ids))

    def check_release(self, value: Any) -> None:
        """Refuse a value that would make the reply too large: views are filled up before they leave."""
        rows = zip(value.shape, value.stride(), strict=True)
        self._leaves("fetch", math.prod(n for n, step in rows if step) * value.element_size())

    def check_filled(self, what: str, specs: Iterable[Spec]) -> None:
        """Refuse values of these types that would make the reply too large, where none is a view."""
        self._leaves(what, sum(spec.size.numel() * spec.dtype.itemsize for spec in specs))

    def check_time(self, what: str) -> None:
        """Refuse what is no call and takes time, if there is none left."""
        if self.spent >= self._compute_s:
            raise self._late(what)

    def check_found(self, found: Found) -> None:
        """Refuse an answer that would make the reply too large."""
        said = [(info.tags, info.description, 1) for info in found.slots]
        said += [(owned.tags, owned.description, 1 + len(owned.columns)) for owned in found.owned]
        nbytes = sum(ENTRY * parts + len(text) + sum(map(len, tags)) for tags, text, parts in said)
        self._leaves("the answer", nbytes)

    def _leaves(self, what: str, nbytes: int) -> None:
        if self._leaving + nbytes > self._reply_bytes:
            raise LimitError(
                f"{what} would take {nbytes:,} bytes of a reply that may carry {self.limits.reply_bytes:,} and carries "
                f"{self._leaving:,}: ask for less at a time"
            )
        self._leaving += nbytes

    def new_reply(self) -> None:
        """A frame begins, and with it a reply."""
        self._leaving = 0

    def stand_in(self, out: int, failed: Exception) -> None:
        """Bind a failure in the place of a result: only where nothing is bound, and while there is room."""
        store = self._store
        if out <= HOLE or out in store:
            return
        if len(store) < self._slots:
            store[out] = failed
        elif store.turned_away is None:
            store.turned_away = (out, failed)


class _Rule:
    """What a key needs of one operator, looked up once."""

    __slots__ = ("by_name", "kinds", "operator", "trusts", "writes")

    def __init__(self, name: str) -> None:
        self.operator: Operator = operator(name)
        self.writes = self.operator.writes
        self.trusts = trusts_values(name)
        self.by_name = by_kind(self.operator)
        self.kinds = tuple(self.by_name[param.name] for param in self.operator.params if not param.keyword)


@functools.cache
def _rule(name: str) -> _Rule:
    return _Rule(name)


def _number(limit: float | None) -> float:
    return math.inf if limit is None else limit


def _bound(ref: int) -> ProgramError:
    if ref <= HOLE:
        return ProgramError(f"%{ref} is no id: ids of slots are positive")
    return ProgramError(f"%{ref} is bound already in this session; bind each id once")


def _check_new(outs: tuple[int, ...], store: Store) -> None:
    taken = set()
    for out in outs:
        if out != HOLE:
            if out < HOLE or out in store or out in taken:
                raise _bound(out)
            taken.add(out)
