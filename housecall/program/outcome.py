"""What a call gives, known before it runs: each operator is typed on meta tensors, where nothing is computed.

What must live here: types of results, for a caller who goes on without the value and for a worker who must know what
is coming (`forecast`). What must not: limits, sessions, tables of outcomes; typing costs 60-300 us and a look-up 1 us,
so whoever types keeps a table of her own, keyed by (operator, input types, other arguments; see `by_kind`).
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import msgspec
import torch

from ..types import TensorType
from .ops import Operator, Return
from .run import computing
from .typing import DTYPES, meta, parts_of, type_in_parts, type_of

__all__ = ["UNTYPED", "Outcome", "Spec", "by_kind", "expected", "infer", "spec", "stand_in", "spec_of"]


class Spec:
    """A `TensorType` with what torch needs to make a tensor of it. One object for one type, so that it hashes
    and compares by identity.

    `start` is the same type at the start of its storage, `skip` how many bytes of the storage come before this one.
    `volume` is the bytes of its elements, each counted as often as it is repeated: what a loop over it goes through. An
    empty dimension counts as one, since some loops go over the others. `dense`: whether its elements lie side by side
    from the start of the storage on, as they are. `wrapper` is what torch is told to make a tensor without elements of
    this type, at the start of a storage: the less it is told, the faster."""

    __slots__ = (
        "bits",
        "dense",
        "device",
        "dtype",
        "offset",
        "size",
        "skip",
        "start",
        "stride",
        "type",
        "volume",
        "wrapper",
    )

    def __init__(self, type_: TensorType) -> None:
        self.type = type_
        self.size = torch.Size(type_.shape)
        self.stride = type_.stride
        self.offset = type_.offset
        self.dtype = DTYPES[type_.dtype]
        self.device = torch.device(type_.device)
        self.bits = type_.conj or type_.neg
        self.skip = type_.offset * self.dtype.itemsize
        self.start: Spec = spec(msgspec.structs.replace(type_, offset=0)) if type_.offset else self
        self.volume = self.dtype.itemsize * math.prod(max(n, 1) for n in type_.shape)
        side_by_side = self.stride == _dense(type_.shape)
        self.dense = side_by_side and not (self.bits or type_.offset)
        stride = None if side_by_side else self.stride
        self.wrapper = self.size, stride, None, None, self.dtype, torch.strided, self.device


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The stride of elements that lie side by side, as torch gives it."""
    found, step = [], 1
    for n in reversed(shape):
        found.append(step)
        step *= max(n, 1)
    return tuple(found[::-1])


@functools.lru_cache(maxsize=1 << 16)
def spec(type_: TensorType) -> Spec:
    """The spec of a type."""
    return Spec(type_)


def spec_of(tensor: torch.Tensor) -> Spec:
    """The spec of a tensor's type."""
    return _spec_in_parts(*parts_of(tensor))


@functools.lru_cache(maxsize=1 << 16)
def _spec_in_parts(*parts: Any) -> Spec:
    return spec(type_in_parts(*parts))


class Outcome:
    """What a call gives: for each of the operator's results a `Spec`, a list of them, `None` for a hole, a plain
    Python value, or the `Return` that says which argument it is."""

    __slots__ = ("results", "single")

    def __init__(self, results: tuple[Any, ...]) -> None:
        self.results = results
        self.single: Spec | None = results[0] if len(results) == 1 and isinstance(results[0], Spec) else None


# No types can be known before the call has run: its shape depends on elements, or torch has no meta kernel.
UNTYPED = Outcome(())


def by_kind(rules: Operator) -> dict[str, bool]:
    """Which parameters shape a result by the kind of a number alone, not by its value: a table that is keyed by the
    values of floats and scalars would type every new learning rate anew. Ranges are as long as their scalars say."""
    ranges = rules.name.startswith(("arange", "range"))
    return {p.name: not ranges and not p.many and p.kind in ("float", "Scalar", "Tensor") for p in rules.params}


def infer(rules: Operator, function: Any, args: Any, kwargs: Any) -> Outcome:
    """Type one call; `args` are already meta (see `stand_in`). `UNTYPED` if it cannot be typed here: then the
    worker knows, or has the better error message."""
    if rules.dynamic:
        return UNTYPED
    try:
        with warnings.catch_warnings(), computing():
            warnings.simplefilter("ignore")  # the kernel says it again, if it runs
            result = function(*args, **kwargs)
    except NotImplementedError:  # torch has no meta kernel: one that makes nothing needs none
        return UNTYPED if rules.returns else Outcome(())
    except Exception:  # whatever meta tensors cannot do, the worker is asked
        return UNTYPED
    return expected(rules, result)


def expected(rules: Operator, result: Any) -> Outcome:
    """The outcome of a call that gave `result` on meta tensors."""
    results = result if len(rules.returns) > 1 else (result,)
    return Outcome(tuple([_expected(item, value) for item, value in zip(rules.returns, results, strict=False)]))


def _expected(item: Return, value: Any) -> Any:
    if item.same_as:
        return item
    if item.many:
        return [_spec_of(one) for one in value]
    return _spec_of(value)


def _spec_of(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    type_ = type_of(value)
    return spec(TensorType(type_.dtype, type_.shape, type_.stride, type_.offset, "cpu", type_.conj, type_.neg))


@functools.lru_cache(maxsize=4096)
def stand_in(given: Spec) -> torch.Tensor:
    """The meta tensor for a spec. Never written through: whoever may write takes a fresh one from `meta`."""
    return meta(given.type)
