"""One ATen operation on pointers becomes one `Call`: type it (from a table), name its result, queue it.

What must live here: how torch's arguments become a call's, and the few operators that need no call or another
one. It does not know the pointer's methods: `cls` is the pointer class, passed down from `tensor`.

NOTE [Operators that are not sent as they come]
`detach`, `alias`    share the slot: no data moves, so nothing is sent
`empty_like`, ...    become zeros: a worker never hands out memory that others left behind
`as_strided`         becomes views that stay within the value (`strided`): a worker does not reach past one
`t_`, `squeeze_`, ...  become their plain forms, and the pointer then points to the result: slots are shared, so
                     a slot's own shape must not change under the others
`item`               fetches
`copy_`              takes a local source (so `load_state_dict` works), as torch copies between devices
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import PlaceError, UnknownOperator, UsageError
from ..program.call import HOLE, Arg, Call, Complex, Items, Symbol
from ..program.ops import Return, operator
from ..program.outcome import UNTYPED, Outcome, Spec, infer, spec, stand_in
from ..program.typing import meta
from .session import Session, Slot
from .strided import dense_order, steps

__all__ = ["dispatch", "point"]

_make: Any = torch.Tensor._make_wrapper_subclass
_KINDLESS = frozenset((bool, type(None), str))
_TABLE_LIMIT = 1 << 16
_LONGEST = 64  # of a list whose length only the worker knows

_outcomes: dict[tuple[Any, ...], Outcome] = {}
_rules: dict[int, _Rule] = {}


def dispatch(cls: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do one operation on pointers of class `cls`; called by torch, below autograd."""
    try:
        rule = _rules[id(func)]  # torch's overloads live for ever, and hash in Python
    except KeyError:
        rule = _rules[id(func)] = _Rule(func)
    if rule.special is not None:
        return rule.special(cls, rule, args, kwargs)
    try:
        return _issue(cls, rule, args, kwargs)
    except _LocalTensor:
        pass  # only now, with the frames of the attempt gone, can `_adopt` see who holds the tensor
    return _issue(cls, rule, *_adopt(cls, rule, args, kwargs))


class _Rule:
    """What dispatch needs of an operator, looked up once."""

    __slots__ = ("by_kind", "function", "name", "operator", "random", "special", "writes")

    def __init__(self, func: Any) -> None:
        self.name: str = func.name().removeprefix("aten::")
        if "." not in self.name:
            self.name += ".default"
        self.function = func
        self.special: Callable[..., Any] | None = _SPECIAL.get(func)
        if self.special is not None and self.name.split(".")[0] in _REWRITTEN:
            self.operator = operator("zeros_like.default")  # as good as any: it is not sent under its own name
        elif func.namespace != "aten":
            raise UnknownOperator(f"operator '{func.name()}' is not torch's own (aten), and only those are allowed")
        else:
            self.operator = operator(self.name)
        self.random = self.operator.random
        self.writes = self.operator.writes
        if self.operator.reshapes and self.special is None:
            self.special = _reshape
        # Floats and scalars do not shape a result: by kind, not by value, they stand in the key.
        self.by_kind = tuple(not p.many and p.kind in ("float", "Scalar") for p in self.operator.params)


def _issue(cls: Any, rule: _Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Queue one call and return pointers to its results. `_LocalTensor` if a local one is among the arguments."""
    session: Session | None = None
    key: list[Any] = [rule]
    sent: list[Arg] = []
    held: list[Slot] = []  # local scalars that go along must live until the call is queued
    by_kind = rule.by_kind
    for index, arg in enumerate(args):
        kind = type(arg)
        if kind is cls:
            slot = arg._slot
            if slot.session is not session:
                session = _one_place(rule, session, slot.session)
            key.append(arg._spec)
            sent.append(slot.ref)
        elif kind is float or kind is int:
            key.append(kind if by_kind[index] else arg)
            sent.append(arg)
        elif kind in _KINDLESS:
            key.append(arg)
            sent.append(arg)
        else:
            session = session or _session_of(cls, rule, args, kwargs)
            sent.append(_argument(cls, rule, arg, key, held, session, by_kind[index]))
    named: dict[str, Arg] = {}
    if kwargs:
        session = session or _session_of(cls, rule, args, kwargs)
        for name, arg in kwargs.items():
            key.append(name)
            named[name] = _argument(cls, rule, arg, key, held, session, by_kind=True)
    if session is None:
        session = _session_of(cls, rule, args, kwargs)
    try:
        outcome = _outcomes[tuple(key)]
    except KeyError:
        outcome = _outcomes[tuple(key)] = _typed(cls, rule, args, kwargs)
    if rule.random:
        session.seed()
    if outcome.single is not None:
        out = Slot(session)
        session.issue(Call(rule.name, tuple(sent), named, (out.id,)))
        return point(cls, out, outcome.single)
    if outcome is UNTYPED:
        return _issue_untyped(cls, rule, session, Call(rule.name, tuple(sent), named, ()), args, kwargs)
    outs: list[int] = []
    results = [_result(cls, rule, session, item, outs, args, kwargs) for item in outcome.results]
    session.issue(Call(rule.name, tuple(sent), named, tuple(outs)))
    return _returned(rule, results)


def point(cls: Any, slot: Slot, given: Spec) -> Any:
    """A new pointer to a slot."""
    pointer = _make(cls, given.size, given.stride, given.offset, None, given.dtype, torch.strided, given.device)
    pointer._slot = slot
    pointer._spec = given
    if given.bits:
        torch._C._set_conj(pointer, given.type.conj)
        torch._C._set_neg(pointer, given.type.neg)
    return pointer


# -- arguments --------------------------------------------------------------------------------------------


def _one_place(rule: _Rule, first: Session | None, other: Session) -> Session:
    if first is not None:
        here, there = first.location.id, other.location.id
        raise PlaceError(
            f"{rule.name} was given tensors at '{here}' and at '{there}'. Bring them together first: "
            f"x.move({there}) takes a tensor there, x.get() brings it home"
        )
    return other


def _session_of(cls: Any, rule: _Rule, args: Any, kwargs: dict[str, Any]) -> Session:
    """The one session that the pointers among the arguments belong to."""
    session: Session | None = None
    for arg in (*args, *kwargs.values()):
        for item in arg if isinstance(arg, list | tuple) else (arg,):
            if type(item) is cls and item._slot.session is not session:
                session = _one_place(rule, session, item._slot.session)
    if session is None:
        raise UsageError(f"{rule.name}: no argument is a pointer")
    return session


def _argument(
    cls: Any, rule: _Rule, arg: Any, key: list[Any], held: list[Slot], session: Session, by_kind: bool = False
) -> Arg:
    """One argument as a call holds it; what types its result is appended to `key`, what must live to `held`."""
    kind = type(arg)
    if kind is cls:
        if arg._slot.session is not session:
            _one_place(rule, session, arg._slot.session)
        key.append(arg._spec)
        return arg._slot.ref  # type: ignore[no-any-return]  # a slot's ref is a Ref
    if kind is float or kind is int:
        key.append(kind if by_kind else arg)
        return arg  # type: ignore[no-any-return]  # an int or a float
    if kind in _KINDLESS:
        key.append(arg)
        return arg  # type: ignore[no-any-return]  # a bool, a str or None
    if isinstance(arg, list | tuple):
        key.append(len(arg))
        return Items(tuple([_argument(cls, rule, item, key, held, session) for item in arg]))
    if kind is complex:
        key.append(kind)
        return Complex(arg.real, arg.imag)
    if isinstance(arg, torch.Tensor):
        return _local(arg, key, held, session)
    return _symbol(rule, arg, key)


class _LocalTensor(Exception):  # not an error yet: `dispatch` decides
    """A local tensor with dimensions stands among the arguments."""


def _local(tensor: torch.Tensor, key: list[Any], held: list[Slot], session: Session) -> Arg:
    """A local tensor without dimensions goes along, as torch lets it with CUDA."""
    if tensor.dim() > 0:
        raise _LocalTensor
    slot, type_ = session.put(tensor)
    key.append(spec(type_))
    held.append(slot)
    return slot.ref


# Parameters that hold positions or torch's own draws, not data: torch makes them here, in Python, or lets them
# be on the CPU beside a CUDA tensor (`x[[0, 2]]`).
_POSITIONS = frozenset(("indices", "offsets", "random_samples"))


def _adopt(cls: Any, rule: _Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """The arguments with such local tensors sent along as may be; a `PlaceError` for any other.

    NOTE [Tensors that torch makes]
    Composite operators (`quantile`, causal attention) make constants where `device` says, and for a pointer that
    is here. Such a tensor is known by being known to nobody: its Python object was made for this very call, so
    only the argument tuple refers to it, and to its base if it is a view. A tensor of the caller's, even one
    that was never given a name, is on some Python stack as well.
    """
    session = _session_of(cls, rule, args, kwargs)
    params = [param.name for param in rule.operator.params]

    def adopted(holder: Any, at: Any, name: str) -> Any:
        item = holder[at]
        if isinstance(item, list | tuple):
            return [adopted(item, index, name) for index in range(len(item))]
        if not isinstance(item, torch.Tensor) or type(item) is cls or item.dim() == 0:
            return item
        del item
        if name in _POSITIONS or _unheld(holder, at):
            slot, type_ = session.put(holder[at])
            return point(cls, slot, spec(type_))
        where = session.location.id
        raise PlaceError(
            f"{rule.name} was given a tensor at '{where}' and a local one of shape {tuple(holder[at].shape)}. "
            f"Send the local one there with .send({where}), or bring the other home with .get()"
        )

    return (
        tuple([adopted(args, index, params[index]) for index in range(len(args))]),
        {name: adopted(kwargs, name, name) for name in kwargs},
    )


def _unheld(holder: Any, at: Any) -> bool:
    """Whether nothing but `holder` refers to the Python object at `at`, nor to that of its base. Counted are
    getrefcount's own argument, torch's tensor (which keeps its Python object), and the holder."""
    if sys.getrefcount(holder[at]) > 3:
        return False
    return not holder[at]._is_view() or sys.getrefcount(holder[at]._base) <= 2


_SYMBOLS = {
    torch.dtype: "dtype", torch.device: "device", torch.layout: "layout", torch.memory_format: "memory_format",
}  # fmt: skip


def _symbol(rule: _Rule, arg: Any, key: list[Any]) -> Arg:
    kind = _SYMBOLS.get(type(arg))
    if kind is None:
        what = "a torch.Generator" if isinstance(arg, torch.Generator) else f"a {type(arg).__name__}"
        hint = "call torch.manual_seed: workers follow it" if isinstance(arg, torch.Generator) else "pass a plain value"
        raise UsageError(f"{rule.name} was given {what}, which cannot go to a worker; {hint}")
    key.append(arg)
    return Symbol(kind, str(arg).removeprefix("torch."))  # type: ignore[arg-type]  # one of the four kinds


# -- results ----------------------------------------------------------------------------------------------


def _typed(cls: Any, rule: _Rule, args: Any, kwargs: dict[str, Any]) -> Outcome:
    if len(_outcomes) >= _TABLE_LIMIT:
        _outcomes.clear()
    stands = [_as_meta(cls, arg, rule.writes) for arg in args]
    named = {name: _as_meta(cls, arg, rule.writes) for name, arg in kwargs.items()}
    return infer(rule.operator, rule.function, stands, named)


def _as_meta(cls: Any, arg: Any, fresh: bool) -> Any:
    if type(arg) is cls:
        return meta(arg._spec.type) if fresh else stand_in(arg._spec)
    if isinstance(arg, torch.Tensor):
        return arg.to("meta")
    if isinstance(arg, torch.device):
        return torch.device("meta")
    if isinstance(arg, list | tuple):
        return [_as_meta(cls, item, fresh) for item in arg]
    return arg


def _result(
    cls: Any, rule: _Rule, session: Session, item: Any, outs: list[int], args: Any, kwargs: dict[str, Any]
) -> Any:
    """The result that the caller gets for one expected item; the ids it binds are appended to `outs`."""
    if isinstance(item, Spec):
        slot = Slot(session)
        outs.append(slot.id)
        return point(cls, slot, item)
    if isinstance(item, list):
        return [_result(cls, rule, session, one, outs, args, kwargs) for one in item]
    if isinstance(item, Return):
        return _same(rule, item, args, kwargs)
    outs.append(HOLE)
    return item


def _same(rule: _Rule, item: Return, args: Any, kwargs: dict[str, Any]) -> Any:
    if item.same_as in kwargs:
        return kwargs[item.same_as]
    names = [param.name for param in rule.operator.params]
    return args[names.index(item.same_as)]


def _returned(rule: _Rule, results: list[Any]) -> Any:
    if not rule.operator.returns:
        return None
    return results[0] if len(results) == 1 else tuple(results)


def _issue_untyped(cls: Any, rule: _Rule, session: Session, call: Call, args: Any, kwargs: dict[str, Any]) -> Any:
    """Queue a call whose results only the worker can type, and ask it: one round trip."""
    fresh = [item for item in rule.operator.returns if not item.same_as]
    slots = [[Slot(session) for _ in range(_LONGEST if item.many else 1)] for item in fresh]
    session.issue(Call(call.op, call.args, call.kwargs, tuple(slot.id for group in slots for slot in group)))
    types = iter(session.describe([slot for group in slots for slot in group]))
    groups = iter(zip(fresh, slots, strict=True))
    results = []
    for item in rule.operator.returns:
        if item.same_as:
            results.append(_same(rule, item, args, kwargs))
            continue
        expected, group = next(groups)
        found = [None if type_ is None else point(cls, slot, spec(type_)) for slot, type_ in zip(group, types)]  # noqa: B905  # each group takes its own share
        if expected.many:
            results.append([pointer for pointer in found if pointer is not None])
        elif expected.kind != "Tensor" and found[0] is not None:
            results.append(_item(group[0]))
        else:
            results.append(found[0])
    return _returned(rule, results)


def _item(slot: Slot) -> Any:
    return slot.session.fetch([slot])[0].item()


# -- operators that are not sent as they come: see the NOTE -----------------------------------------------


def _share(cls: Any, rule: _Rule | None, args: Any, kwargs: dict[str, Any]) -> Any:
    pointer = args[0]
    _ = pointer._slot.session
    return point(cls, pointer._slot, pointer._spec)


def _scalar(cls: Any, rule: _Rule, args: Any, kwargs: dict[str, Any]) -> Any:
    _ = args[0]._slot.session
    return _item(args[0]._slot)


def _zeros(cls: Any, rule: _Rule, args: Any, kwargs: dict[str, Any]) -> Any:
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory" or value}
    aten = torch.ops.aten
    match rule.function:
        case aten.empty_like.default:
            return dispatch(cls, aten.zeros_like.default, args, kwargs)
        case aten.new_empty.default:
            return dispatch(cls, aten.new_zeros.default, args, kwargs)
        case _:
            size, stride = args[1], args[2]
            order = dense_order(size, stride) if 0 not in size else None
            if order is not None:
                zeros = dispatch(cls, aten.new_zeros.default, (args[0], [size[dim] for dim in order]), kwargs)
                back = sorted(range(len(order)), key=lambda at: order[at])
                return zeros if order == sorted(order) else dispatch(cls, aten.permute.default, (zeros, back), {})
            extent = 0 if 0 in size else 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
            flat = dispatch(cls, aten.new_zeros.default, (args[0], [extent]), kwargs)
            return _strided(cls, flat, size, stride, 0)


def _strided(cls: Any, pointer: Any, size: Any, stride: Any, offset: int) -> Any:
    found = pointer
    for function, args in steps(pointer._spec.type, size, stride, offset):
        found = dispatch(cls, function, (found, *args), {})
    return _share(cls, None, (found,), {}) if found is pointer else found


def _as_strided(cls: Any, rule: _Rule, args: Any, kwargs: dict[str, Any]) -> Any:
    pointer, size, stride, offset = _strided_args(args, kwargs)
    return _strided(cls, pointer, size, stride, pointer._spec.offset if offset is None else offset)


def _as_strided_copy(cls: Any, rule: _Rule, args: Any, kwargs: dict[str, Any]) -> Any:
    return dispatch(cls, _aten.clone.default, (_as_strided(cls, rule, args, kwargs),), {})


def _as_strided_scatter(cls: Any, rule: _Rule, args: Any, kwargs: dict[str, Any]) -> Any:
    pointer, size, stride, offset = _strided_args((args[0], *args[2:]), kwargs)
    result = dispatch(cls, _aten.clone.default, (pointer,), {})  # where its storage starts anew
    start = 0 if offset is None else offset - pointer._spec.offset
    dispatch(cls, _aten.copy_.default, (_strided(cls, result, size, stride, start), args[1]), {})
    return result


def _strided_args(args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """self, size, stride and offset, whichever of them came by name."""
    given = dict(zip(("self", "size", "stride", "storage_offset"), args, strict=False)) | kwargs
    return given["self"], given["size"], given["stride"], given.get("storage_offset")


def _reshape(cls: Any, rule: _Rule, args: Any, kwargs: dict[str, Any]) -> Any:
    base, _, which = rule.name.partition(".")
    plain = getattr(getattr(torch.ops.aten, base.removesuffix("_")), "int" if base == "transpose_" else which)
    pointer = args[0]
    result = dispatch(cls, plain, args, kwargs)
    with _disable_current_modes(), torch._C._DisableTorchDispatch():
        rule.function(*args, **kwargs)  # the shape of the wrapper itself
    pointer._slot, pointer._spec = result._slot, result._spec
    return pointer


def _copy(cls: Any, rule: _Rule, args: Any, kwargs: dict[str, Any]) -> Any:
    target, source, *rest = args
    if type(target) is not cls:
        where = source.location.id
        raise PlaceError(f"copy_ from a tensor at '{where}' into a local one: bring it home first, with .get()")
    if type(source) is not cls:
        slot, type_ = target._slot.session.put(source)
        source = point(cls, slot, spec(type_))
    return _issue(cls, rule, (target, source, *rest), kwargs)


_aten = torch.ops.aten
_REWRITTEN = frozenset(
    (
        "empty_like",
        "new_empty",
        "new_empty_strided",
        "as_strided",
        "as_strided_",
        "as_strided_copy",
        "as_strided_scatter",
    )
)
_SPECIAL: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _share,
    _aten.alias.default: _share,
    _aten.lift_fresh.default: _share,
    _aten._local_scalar_dense.default: _scalar,
    _aten.empty_like.default: _zeros,
    _aten.new_empty.default: _zeros,
    _aten.new_empty_strided.default: _zeros,
    _aten.as_strided.default: _as_strided,
    _aten.as_strided_.default: _reshape,
    _aten.as_strided_copy.default: _as_strided_copy,
    _aten.as_strided_scatter.default: _as_strided_scatter,
    _aten.copy_.default: _copy,
}
