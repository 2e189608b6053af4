"""Operations on pointers: most become a call as they come, a few need another call, or none.

NOTE [Operators that are not sent as they come]
`detach`, `alias`    share the slot: no data moves, so nothing is sent
`empty_like`, ...    become zeros: a worker never hands out memory that others left behind
`as_strided`         becomes views that stay within the value (`strided`): a worker does not reach past one
`t_`, `squeeze_`, ...  become their plain forms, and the pointer then points to the result: slots are shared, so
                     a slot's own shape must not change under the others
`item`               fetches
`div.out`, ...       become the same without `out`, and a copy into it (`out`): nothing is resized
`copy_`              takes a local source (so `load_state_dict` works), as torch copies between devices
`flatten`, ...        become the operators that torch makes them of, where autograd has not done so: in inference mode
`_pack_padded_sequence`  takes local lengths, and gives local batch sizes, as with CUDA: recurrent modules read them
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import PlaceError, UsageError
from ..program.ops import table
from ..transport.whole import whole
from .calls import Rule, issue, item, point, session_of
from .out import rewritten
from .repeat import again
from .strided import dense_order, steps

__all__ = ["dispatch"]

# Of the pointer class, torch's operator and its arguments.
Special = Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any]

_known: dict[int, tuple[Special | None, Rule | None]] = {}


def dispatch(cls: Any, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
    """Do one operation on pointers of class `cls`: its `__torch_dispatch__`, which torch calls below autograd."""
    if args and type(args[0]) is cls:
        if func is _DETACH:  # the most frequent of all: autograd's own
            return _share(cls, func, args, kwargs)
        session = args[0]._slot.session
        expected = session.trace.step.next
        if expected is not None and expected.pattern[0] is func:
            found = again(cls, session, expected, args, kwargs)
            if found is not None:
                return found
    try:
        special, rule = _known[id(func)]  # torch's overloads live for ever, and hash in Python
    except KeyError:
        special, rule = _known[id(func)] = _look_up(func)
    named = kwargs or {}
    if special is not None:
        return special(cls, func, args, named)
    assert rule is not None
    if args and type(args[0]) is cls:
        return issue(cls, rule, args[0]._slot.session, args, named)
    return issue(cls, rule, session_of(cls, rule, args, named), args, named)


dispatch._torchdynamo_disable = True  # type: ignore[attr-defined]  # torch.compile's mark: not to be traced into


def _look_up(func: Any) -> tuple[Special | None, Rule | None]:
    with whole():  # a generator that is closed swallows an interrupt
        special = _SPECIAL.get(func) or rewritten(func) or (_composed if _is_composed(func) else None)
        if special is not None:
            return special, None
        rule = Rule(func)
        return (_reshape, None) if rule.operator.reshapes else (None, rule)


def _is_composed(func: Any) -> bool:
    """Whether a worker does not know an operator that torch makes of others."""
    name = func.name().removeprefix("aten::")
    known = name if "." in name else f"{name}.default"
    return func.namespace == "aten" and known not in table() and bool(func.has_kernel_for_dispatch_key(_COMPOSITE))


# -- operators that are not sent as they come: see the NOTE -----------------------------------------------


def _share(cls: Any, func: Any, args: Any, kwargs: dict[str, Any] | None) -> Any:
    slot = args[0]._slot
    _ = slot.session
    return point(cls, slot)


def _composed(cls: Any, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return func._op_dk(_COMPOSITE, *args, **kwargs)  # torch's own kernel, whatever decompositions there are in Python


def _scalar(cls: Any, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    _ = args[0]._slot.session
    return item(args[0]._slot)


def _zeros(cls: Any, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory" or value}
    aten = torch.ops.aten
    match func:
        case aten.empty_like.default:
            return dispatch(cls, aten.zeros_like.default, (), args, kwargs)
        case aten.new_empty.default:
            return dispatch(cls, aten.new_zeros.default, (), args, kwargs)
        case _:
            size, stride = args[1], args[2]
            order = dense_order(size, stride) if 0 not in size else None
            if order is not None:
                zeros = dispatch(cls, aten.new_zeros.default, (), (args[0], [size[dim] for dim in order]), kwargs)
                back = sorted(range(len(order)), key=lambda at: order[at])
                return zeros if order == sorted(order) else dispatch(cls, aten.permute.default, (), (zeros, back), {})
            extent = 0 if 0 in size else 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
            flat = dispatch(cls, aten.new_zeros.default, (), (args[0], [extent]), kwargs)
            return _strided(cls, flat, size, stride, 0)


def _strided(cls: Any, pointer: Any, size: Any, stride: Any, offset: int) -> Any:
    found = pointer
    for function, args in steps(pointer._slot.type, size, stride, offset):
        found = dispatch(cls, function, (), (found, *args), {})
    return point(cls, pointer._slot) if found is pointer else found


def _as_strided(cls: Any, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    pointer, size, stride, offset = _strided_args(args, kwargs)
    return _strided(cls, pointer, size, stride, pointer._slot.type.offset if offset is None else offset)


def _as_strided_copy(cls: Any, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return dispatch(cls, _aten.clone.default, (), (_as_strided(cls, func, args, kwargs),), {})


def _as_strided_scatter(cls: Any, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    pointer, size, stride, offset = _strided_args((args[0], *args[2:]), kwargs)
    result = dispatch(cls, _aten.clone.default, (), (pointer,), {})  # where its storage starts anew
    start = 0 if offset is None else offset - pointer._slot.type.offset
    dispatch(cls, _aten.copy_.default, (), (_strided(cls, result, size, stride, start), args[1]), {})
    return result


def _strided_args(args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """self, size, stride and offset, whichever of them came by name."""
    given = dict(zip(("self", "size", "stride", "storage_offset"), args, strict=False)) | kwargs
    return given["self"], given["size"], given["stride"], given.get("storage_offset")


def _reshape(cls: Any, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    base, _, which = func.name().removeprefix("aten::").partition(".")
    plain = getattr(getattr(_aten, base.removesuffix("_")), "int" if base == "transpose_" else which or "default")
    pointer = args[0]
    result = dispatch(cls, plain, (), args, kwargs)
    with whole():
        with _disable_current_modes(), torch._C._DisableTorchDispatch():
            func(*args, **kwargs)  # the shape of the wrapper itself
        pointer._slot = result._slot
    return pointer


def _copy(cls: Any, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    target, source, *rest = args
    if type(target) is not cls:
        where = source.location.id
        raise PlaceError(f"copy_ from a tensor at '{where}' into a local one: bring it home first, with .get()")
    if type(source) is not cls:
        source = point(cls, target._slot.session.put(source))
    return issue(cls, _COPY, target._slot.session, (target, source, *rest), kwargs)


def _pack(cls: Any, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    x, lengths, batch_first = args
    if isinstance(lengths, cls):
        raise UsageError("the lengths of a packed sequence are read here: give them as a list or a local tensor")
    steps_first = dispatch(cls, _aten.transpose.int, (), (x, 0, 1), {}) if batch_first else x
    steps, batch, *rest = steps_first.shape
    _, sizes = torch._VF._pack_padded_sequence(torch.zeros(steps, batch, 1), lengths, False)
    flat = dispatch(cls, _aten.clone.default, (), (steps_first,), {"memory_format": torch.contiguous_format})
    flat = dispatch(cls, _aten.view.default, (), (flat, [steps * batch, *rest]), {})
    chosen = torch.tensor([step * batch + row for step, size in enumerate(sizes.tolist()) for row in range(size)])
    at = point(cls, x._slot.session.put(chosen))
    return dispatch(cls, _aten.index_select.default, (), (flat, 0, at), {}), sizes


_aten = torch.ops.aten
_DETACH = _aten.detach.default
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_COPY = Rule(_aten.copy_.default)
_SPECIAL: dict[Any, Special] = {
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
    _aten._pack_padded_sequence.default: _pack,
}
