"""What results will look like: each operator is typed on meta tensors once per (operator, input types).

Typing costs 60-300 us, a look-up 1 us: `OUTCOMES` is what makes pointers fast. Floats and scalars do not shape
a result, so only their kind is part of the key; else every new learning rate would be typed anew.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..program.ops import Operator, Return
from ..program.run import computing
from ..program.typing import DTYPES, meta, type_of
from ..types import TensorType

__all__ = ["UNTYPED", "Outcome", "Spec", "infer", "spec"]


class Spec:
    """A `TensorType` with what torch needs to make a tensor of it. One object for one type, so that it hashes
    and compares by identity."""

    __slots__ = ("bits", "device", "dtype", "offset", "size", "stride", "type")

    def __init__(self, type_: TensorType) -> None:
        self.type = type_
        self.size = torch.Size(type_.shape)
        self.stride = type_.stride
        self.offset = type_.offset
        self.dtype = DTYPES[type_.dtype]
        self.device = torch.device(type_.device)
        self.bits = type_.conj or type_.neg


@functools.lru_cache(maxsize=1 << 16)
def spec(type_: TensorType) -> Spec:
    """The spec of a type."""
    return Spec(type_)


class Outcome:
    """What a call gives: for each of the operator's results a `Spec`, a list of them, `None` for a hole, a plain
    Python value, or the `Return` that says which argument it is."""

    __slots__ = ("results", "single")

    def __init__(self, results: tuple[Any, ...]) -> None:
        self.results = results
        self.single: Spec | None = results[0] if len(results) == 1 and isinstance(results[0], Spec) else None


# No types can be known before the call has run: its shape depends on elements, or torch has no meta kernel.
UNTYPED = Outcome(())


def infer(rules: Operator, function: Any, args: Any, kwargs: Any) -> Outcome:
    """Type one call; `args` are already meta (see `as_meta`). `UNTYPED` if it cannot be typed here: then the
    worker knows, or has the better error message."""
    if rules.dynamic:
        return UNTYPED
    try:
        with computing():
            result = function(*args, **kwargs)
    except Exception:  # whatever meta tensors cannot do, the worker is asked
        return UNTYPED
    results = result if len(rules.returns) > 1 else (result,)
    return Outcome(tuple(map(_expected, rules.returns, results)))


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
