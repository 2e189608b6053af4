"""Calls that write into `out=`, in other words: the call that gives the same as a result, then a copy into `out`.

A worker's table has hardly any operator with an `out`, which torch would resize where it does not fit, under whoever
shares it; nor may a program write so to its inputs. So what torch asks of an `out` is asked here: of its dtype by torch
itself, on meta tensors, and its shape must be that of the result. Autograd has refused an `out` that wants a gradient
before a call comes here.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch.overrides import enable_reentrant_dispatch

from ..errors import PlaceError, UsageError
from ..program.ops import table
from ..program.run import computing
from ..program.typing import meta
from ..transport.whole import whole

__all__ = ["rewritten"]

_GEOMETRY = frozenset({"dtype", "layout", "device", "pin_memory"})  # what an `out` says by itself


def rewritten(func: Any) -> Callable[..., Any] | None:
    """How to do one of torch's operators that write into `out`: a function of the pointer class, the operator and its
    arguments. `None` for another operator, and for one whose plain form a worker has not."""
    if func.namespace != "aten":
        return None
    written = [arg for arg in func._schema.arguments if _is_written(arg)]
    if not written or not all(arg.kwarg_only for arg in written):
        return None
    plain = _plain(func)
    return None if plain is None else functools.partial(_write, tuple([arg.name for arg in written]), plain)


def _plain(func: Any) -> Any:
    """The overload that gives as results what `func` writes: of its other parameters, and perhaps those that an `out`
    makes needless."""
    wanted = _params(func)
    packet = func.overloadpacket
    found = [getattr(packet, name) for name in packet.overloads()]
    found = [one for one in found if _is_known(one) and not any(map(_is_written, one._schema.arguments))]
    for known in (frozenset[str](), _GEOMETRY):
        for one in found:
            if _without(_params(one), known) == _without(wanted, known):
                return one
    return None


def _is_known(func: Any) -> bool:
    """Whether the table has an operator, or torch makes it of others."""
    full = func.name()
    if _name(func) in table() or not torch._C._dispatch_has_kernel(full):
        return _name(func) in table()
    return torch._C._dispatch_has_kernel_for_dispatch_key(full, "CompositeImplicitAutograd")


def _name(func: Any) -> str:
    name: str = func.name().removeprefix("aten::")
    return name if "." in name else f"{name}.default"


def _is_written(arg: Any) -> bool:
    return bool(arg.alias_info is not None and arg.alias_info.is_write)


def _params(func: Any) -> list[tuple[str, str]]:
    return [(arg.name, str(arg.type)) for arg in func._schema.arguments if not _is_written(arg)]


def _without(params: list[tuple[str, str]], names: frozenset[str]) -> list[tuple[str, str]]:
    return [param for param in params if param[0] not in names]


# -- one call ---------------------------------------------------------------------------------------------


def _write(names: Sequence[str], plain: Any, cls: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = {name: value for name, value in kwargs.items() if name not in names}
    outs = [kwargs[name] for name in names]
    targets = list(_flat(outs))
    _check_places(cls, func, targets, (*args, *given.values()))
    if (
        any(name == "dtype" for name, _ in _params(plain)) and given.get("dtype") is None
    ):  # a sum into float64 is summed in float64
        _ask_torch(cls, func, args, kwargs)
        given["dtype"] = targets[0].dtype
    with enable_reentrant_dispatch(), torch.no_grad():  # where torch makes operators of others
        results = plain(*args, **given)
    values = list(_flat(results if isinstance(results, list | tuple) else (results,)))
    if any(value.dtype is not target.dtype for value, target in zip(values, targets, strict=False)):
        _ask_torch(cls, func, args, kwargs)
    _check_shapes(func, names, values, targets)
    for value, target in zip(values, targets, strict=True):
        torch.ops.aten.copy_.default(target, value)
    if not func._schema.returns:
        return None
    return outs[0] if len(outs) == 1 else tuple(outs)


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value


def _check_places(cls: Any, func: Any, targets: list[Any], args: Iterable[Any]) -> None:
    if any(type(target) is not cls for target in targets):
        raise PlaceError(
            f"{_name(func)} was to write into a local tensor what is at a worker: bring it home, with .get()"
        )
    places = {one._slot.session for one in (*targets, *_flat(args)) if type(one) is cls}
    if len(places) > 1:
        names = " and at ".join(sorted(f"'{session.location.id}'" for session in places))
        raise PlaceError(
            f"{_name(func)} was given tensors at {names}. Bring them together first: .move(worker) takes one to another"
        )


def _check_shapes(func: Any, names: Sequence[str], values: list[Any], targets: list[Any]) -> None:
    """Refuse what torch would resize."""
    if len(values) != len(targets):
        raise UsageError(f"{_name(func)} gives {len(values)} results, and '{names[0]}' has room for {len(targets)}")
    for at, (value, target) in enumerate(zip(values, targets, strict=True)):
        if value.shape != target.shape:
            raise UsageError(
                f"{_name(func)} gives shape {tuple(value.shape)}, and '{names[min(at, len(names) - 1)]}' has "
                f"{tuple(target.shape)}: a tensor at a worker is not resized. Give it that shape, or take the result"
            )


def _ask_torch(cls: Any, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Let torch do the call on tensors without elements: what it refuses, it refuses here, in its own words."""
    stands = [_stand_in(cls, arg) for arg in args]
    named = {name: _stand_in(cls, arg) for name, arg in kwargs.items()}
    with whole(), warnings.catch_warnings(), computing():
        warnings.simplefilter("ignore")  # that it resizes: an error, soon
        with suppress(NotImplementedError):  # it has no such kernel
            func(*stands, **named)


def _stand_in(cls: Any, arg: Any) -> Any:
    if type(arg) is cls:
        return meta(arg._slot.type)
    if isinstance(arg, torch.Tensor):
        return arg.to("meta") if arg.dim() else arg
    return [_stand_in(cls, one) for one in arg] if isinstance(arg, list | tuple) else arg
