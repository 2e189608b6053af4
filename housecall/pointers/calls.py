"""A call on pointers: its arguments, the step that it takes in its session's trace, pointers to its results.

What must live here: how torch's arguments become what decides a call and what a call says, and how it is typed (from a
table). What must not: operators that need another call, or none (`dispatch`). It does not know the pointer's methods:
`cls` is the pointer class, passed down from `tensor`.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import PlaceError, UnknownOperator, UsageError
from ..program.call import HOLE, Arg, Call, Complex, Items, Symbol
from ..program.ops import Return, operator
from ..program.outcome import UNTYPED, Outcome, Spec, by_kind, infer, spec, spec_of, stand_in
from ..program.typing import meta
from ..transport.whole import whole
from ..types import Ref, TensorType
from .adoption import LocalTensor, adopted
from .repeat import pattern_of, point
from .session import Cut, Session
from .site import caller_again
from .slot import Slot
from .trace import NUMBER, Trace, register

__all__ = ["Rule", "issue", "item", "point", "session_of"]

_NONE = type(None)
_TABLE_LIMIT = 1 << 16
_LONGEST = 64  # of a list whose length only the worker knows

_default_dtype = torch.get_default_dtype
_UNKNOWN = Spec(TensorType("uint8", (0,), (1,)))  # until the worker has said what it is
_outcomes: dict[tuple[Any, ...], Outcome] = {}


class Rule:
    """What a call needs of its operator, looked up once. `same`: which of its arguments is its only result, `view`:
    whose storage its results may share; -1 if none."""

    __slots__ = (
        "by_kind", "by_name", "function", "kinds", "name", "operator", "params", "random", "same", "view", "written",
    )  # fmt: skip

    def __init__(self, func: Any) -> None:
        self.name: str = func.name().removeprefix("aten::")
        if "." not in self.name:
            self.name += ".default"
        if func.namespace != "aten":
            raise UnknownOperator(f"operator '{func.name()}' is not torch's own (aten), and only those are allowed")
        self.function = func
        self.operator = operator(self.name)
        self.random = self.operator.random
        self.written = {param.name for param in self.operator.params if param.writes}
        self.params = [param.name for param in self.operator.params]
        self.kinds = {param.name: param.kind for param in self.operator.params}
        self.by_name = by_kind(self.operator)  # floats and scalars do not shape a result: their kind types it
        self.by_kind = [self.by_name[name] for name in self.params]
        only = self.operator.returns[0].same_as if len(self.operator.returns) == 1 else ""
        self.same = self.params.index(only) if only else -1
        views = [given.view_of for given in self.operator.returns if given.view_of]
        self.view = self.params.index(views[0]) if views else -1


def issue(cls: Any, rule: Rule, session: Session, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Issue one call in a session, and return pointers to its results."""
    with session.lock:
        if rule.random:
            session.seed()
        while True:
            try:
                return _step(cls, rule, session, args, kwargs)
            except Cut:
                adopts = False
            except LocalTensor:
                adopts = True
            except BaseException:  # Ctrl-C, in the middle of a step
                session.mend()
                raise
            if adopts:  # only now, with the frames of the attempt gone, can be seen who holds the tensor

                def sent(tensor: torch.Tensor) -> Any:
                    return point(cls, session.put(tensor))

                args, kwargs = adopted(cls, rule.name, rule.params, session.location.id, args, kwargs, sent)
            else:
                session.cut()


def _step(cls: Any, rule: Rule, session: Session, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Take the step of one call in the session's trace. Raises `LocalTensor` if there is one among the arguments, and
    `Cut`, both before anything is done."""
    trace = session.trace
    session.note(trace)
    here = trace.step
    parts: list[Any] = [rule]
    numbers: list[float] = []
    for index, arg in enumerate(args):
        kind = type(arg)
        if kind is cls:
            parts.append(_register(rule, session, arg))
        elif kind is int or kind is _NONE:
            parts.append(arg)
        else:
            parts.append(_part(cls, rule, session, arg, rule.params[index], numbers))
    for name, arg in kwargs.items():
        parts.append(name)
        parts.append(_part(cls, rule, session, arg, name, numbers))
    if _default_dtype() is not torch.float32:
        parts.append(_default_dtype())
    key = tuple(parts)
    step = trace.step.after.get(key)
    if step is None:
        outcome = _outcome(cls, rule, session, args, kwargs)
        if outcome is UNTYPED:
            return _untyped(cls, rule, session, key, numbers, args, kwargs)
        call = _call(rule, key, len(args), len(kwargs), outcome, trace)
        step = trace.tree.add(trace.step, key, call=call, given=outcome)
    elif step.pattern is None:
        step.pattern = pattern_of(cls, rule, step, args, kwargs)
    here.next = step if step.pattern else None
    trace.step = step
    trace.sites.append(caller_again(step))
    if numbers:
        trace.numbers += numbers
    result: Any
    if step.given.single is not None:
        skip = _skip(rule, args, kwargs) if rule.view >= 0 else 0
        result = point(cls, Slot(session, step.given.single, trace, skip))
    elif 0 <= rule.same < len(args):
        result = args[rule.same]
    else:
        made = [_result(cls, rule, session, trace, one, args, kwargs) for one in step.given.results]
        result = _returned(rule, made)
    trace.room -= 1
    if trace.room <= 0:
        session.full()
    return result


# -- arguments --------------------------------------------------------------------------------------------


def session_of(cls: Any, rule: Rule, args: Any, kwargs: dict[str, Any]) -> Session:
    """The one session that the pointers among the arguments belong to."""
    session: Session | None = None
    for arg in (*args, *kwargs.values()):
        for one in arg if isinstance(arg, list | tuple) else (arg,):
            if type(one) is cls and one._slot.session is not session:
                session = _one_place(rule, session, one._slot.session)
    if session is None:
        raise UsageError(f"{rule.name}: no argument is a pointer")
    return session


def _one_place(rule: Rule, first: Session | None, other: Session) -> Session:
    if first is not None:
        here, there = first.location.id, other.location.id
        raise PlaceError(
            f"{rule.name} was given tensors at '{here}' and at '{there}'. Bring them together first: "
            f"x.move({there}) takes a tensor there, x.get() brings it home"
        )
    return other


def _register(rule: Rule, session: Session, pointer: Any) -> Ref:
    """The register in the present trace of what a pointer points at."""
    slot: Slot = pointer._slot
    trace = session.trace
    if slot.trace is not trace:
        if slot.session is not session:
            _one_place(rule, session, slot.session)
        session.take(slot)
    if slot.taken and not pointer.is_leaf:
        trace.reaches_back = True
    return slot.register


def _part(cls: Any, rule: Rule, session: Session, arg: Any, param: str, numbers: list[float]) -> Any:
    """What an argument is in a step's key. A float that may be a number of a program goes to `numbers`."""
    kind = type(arg)
    if kind is cls:
        return _register(rule, session, arg)
    if kind is float:
        if rule.by_name.get(param):
            numbers.append(arg)
            return NUMBER
        return kind, arg.hex()  # 0.0 and -0.0 are equal, and not the same
    if kind is int or kind is str or kind is _NONE:
        return arg
    if kind is bool or kind is complex:  # True is equal to 1
        return kind, repr(arg)
    if isinstance(arg, list | tuple):
        return tuple([_part(cls, rule, session, one, f"{param}[]", numbers) for one in arg])
    if isinstance(arg, torch.Tensor):
        if arg.dim() > 0:
            raise LocalTensor
        if param.removesuffix("[]") in rule.written:
            raise PlaceError(
                f"{rule.name} was to write what is at '{session.location.id}' into a local tensor: bring it home "
                "first, with .get()"
            )
        return session.take(session.put(arg))  # a number goes along, as torch lets it with CUDA
    if type(arg) not in _SYMBOLS:
        what = "a torch.Generator" if isinstance(arg, torch.Generator) else f"a {type(arg).__name__}"
        hint = "call torch.manual_seed: workers follow it" if isinstance(arg, torch.Generator) else "pass a plain value"
        raise UsageError(f"{rule.name} was given {what}, which cannot go to a worker; {hint}")
    return arg


_SYMBOLS = {
    torch.dtype: "dtype", torch.device: "device", torch.layout: "layout", torch.memory_format: "memory_format",
}  # fmt: skip
_READ = {float: float.fromhex, bool: "True".__eq__, complex: complex}  # from the text that stands in a key


def _arg(part: Any) -> Arg:
    """What a call says for a part of its key."""
    if isinstance(part, tuple):
        if part and isinstance(part[0], type):
            value = _READ[part[0]](part[1])  # type: ignore[operator]  # each takes a text
            return Complex(value.real, value.imag) if part[0] is complex else value
        return Items(tuple(map(_arg, part)))
    kind = _SYMBOLS.get(type(part))
    if kind is not None:
        return Symbol(kind, str(part).removeprefix("torch."))  # type: ignore[arg-type]  # one of the four kinds
    return part  # type: ignore[no-any-return]  # a register, a number, a text or None


def _call(rule: Rule, key: tuple[Any, ...], count: int, named: int, outcome: Outcome, trace: Trace) -> Call:
    """The call of a key that begins with `count` positional and `named` named arguments, over registers."""
    outs: list[int] = []
    for given in outcome.results:
        for one in given if isinstance(given, list) else (given,):
            if not isinstance(one, Return):
                made = sum(out != HOLE for out in outs)
                outs.append(register(len(trace.ids) + made).id if isinstance(one, Spec) else HOLE)
    return _said(rule, key, count, named, tuple(outs))


def _said(rule: Rule, key: tuple[Any, ...], count: int, named: int, outs: tuple[int, ...]) -> Call:
    names, parts = (key[at : 1 + count + 2 * named : 2] for at in (1 + count, 2 + count))
    kwargs = {name: _arg(part) for name, part in zip(names, parts, strict=True)}
    return Call(rule.name, tuple(map(_arg, key[1 : 1 + count])), kwargs, outs)


# -- results ----------------------------------------------------------------------------------------------


def _outcome(cls: Any, rule: Rule, session: Session, args: Any, kwargs: dict[str, Any]) -> Outcome:
    """What the call gives, from a table that remembers (operator, types of arguments)."""
    default = _default_dtype()
    if session.transport.remote and default is not torch.float32:
        found = _typed(cls, rule, args, kwargs)
        with whole():
            torch.set_default_dtype(torch.float32)
            try:
                there = _typed(cls, rule, args, kwargs)
            finally:
                torch.set_default_dtype(default)
        if there.results != found.results:
            raise UsageError(
                f"{rule.name} depends on torch's default dtype, which is {default} here and torch.float32 at worker "
                f"'{session.location.id}': convert its arguments first, with .to(dtype)"
            )
        return found
    return _typed(cls, rule, args, kwargs)


def _typed(cls: Any, rule: Rule, args: Any, kwargs: dict[str, Any]) -> Outcome:
    key = (
        rule,
        _default_dtype(),
        *[_type_part(cls, arg, by_kind) for arg, by_kind in zip(args, rule.by_kind, strict=False)],
        *[(name, _type_part(cls, arg, rule.by_name[name])) for name, arg in kwargs.items()],
    )
    known = _outcomes.get(key)
    if known is not None:
        return known
    if len(_outcomes) >= _TABLE_LIMIT:
        _outcomes.clear()
    stands = [_as_meta(cls, arg, bool(rule.written)) for arg in args]
    named = {name: _as_meta(cls, arg, bool(rule.written)) for name, arg in kwargs.items()}
    with whole():  # typing sets torch's switches for this thread
        found = infer(rule.operator, rule.function, stands, named)
    for written in rule.written:
        _check_size(rule, written, args, kwargs, stands, named)
    _outcomes[key] = found
    return found


def _check_size(rule: Rule, name: str, args: Any, kwargs: Any, stands: Any, named: Any) -> None:
    """Refuse an `out` that would be resized: the pointer, and whoever shares it, would not know."""
    at = rule.params.index(name)
    before, after = (args[at], stands[at]) if at < len(args) else (kwargs.get(name), named.get(name))
    if isinstance(after, torch.Tensor) and not isinstance(before, list) and before.shape != after.shape:
        raise UsageError(
            f"{rule.name} gives shape {tuple(after.shape)}, and '{name}' has {tuple(before.shape)}: give it that "
            "shape, or take the result"
        )


def _type_part(cls: Any, arg: Any, by_kind: bool) -> Any:
    kind = type(arg)
    if kind is cls:
        return arg._slot.spec
    if isinstance(arg, torch.Tensor):
        return spec_of(arg)
    if kind is float or kind is int:
        return kind if by_kind else (kind, arg)
    if isinstance(arg, list | tuple):
        return tuple([_type_part(cls, one, False) for one in arg])
    return kind if kind is complex else (kind, arg)


def _as_meta(cls: Any, arg: Any, fresh: bool) -> Any:
    if type(arg) is cls:
        given = arg._slot.spec
        return meta(given.type) if fresh else stand_in(given)
    if isinstance(arg, torch.Tensor):
        return arg.to("meta")
    if isinstance(arg, torch.device):
        return torch.device("meta")
    if isinstance(arg, list | tuple):
        return [_as_meta(cls, one, fresh) for one in arg]
    return arg


def _result(cls: Any, rule: Rule, session: Session, trace: Trace, given: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result that the caller gets for one expected item."""
    if isinstance(given, Spec):
        skip = _skip(rule, args, kwargs) if rule.view >= 0 else 0
        return point(cls, Slot(session, given, trace, skip))
    if isinstance(given, list):
        return [_result(cls, rule, session, trace, one, args, kwargs) for one in given]
    return _same(rule, given, args, kwargs) if isinstance(given, Return) else given


def _skip(rule: Rule, args: Any, kwargs: dict[str, Any]) -> int:
    """How many bytes of its storage come before the value that the results may be views of."""
    source = args[rule.view] if rule.view < len(args) else kwargs[rule.params[rule.view]]
    return source._slot.skip  # type: ignore[no-any-return]  # a pointer's


def _same(rule: Rule, given: Return, args: Any, kwargs: dict[str, Any]) -> Any:
    if given.same_as in kwargs:
        return kwargs[given.same_as]
    return args[rule.params.index(given.same_as)]


def _returned(rule: Rule, results: list[Any]) -> Any:
    if not rule.operator.returns:
        return None
    return results[0] if len(results) == 1 else tuple(results)


def _untyped(
    cls: Any, rule: Rule, session: Session, key: tuple[Any, ...], numbers: list[float], args: Any, kwargs: Any
) -> Any:
    """Issue a call whose results only the worker can type, and ask it: one round trip."""
    fresh = [given for given in rule.operator.returns if not given.same_as]
    slots = [[Slot(session, _UNKNOWN) for _ in range(_LONGEST if given.many else 1)] for given in fresh]
    outs = [slot for group in slots for slot in group]
    ids = tuple([slot.id for slot in outs])
    call = session.trace.over_slots(_said(rule, key, len(args), len(kwargs), ids), iter(numbers), ids)
    for slot, type_ in zip(outs, session.types_of(call, outs), strict=True):
        if type_ is not None:
            slot.spec, slot.skip = spec(type_).start, spec(type_).skip
    groups = iter(zip(fresh, slots, strict=True))
    results = []
    for given in rule.operator.returns:
        if given.same_as:
            results.append(_same(rule, given, args, kwargs))
            continue
        expected, group = next(groups)
        found = [point(cls, slot) if slot.spec is not _UNKNOWN else None for slot in group]
        if expected.many:
            results.append([pointer for pointer in found if pointer is not None])
        elif expected.kind != "Tensor" and found[0] is not None:
            results.append(item(group[0]))
        else:
            results.append(found[0])
    return _returned(rule, results)


def item(slot: Slot) -> Any:
    """The one element of a slot; waits for it."""
    return slot.session.fetch([slot])[0].item()
