"""`as_strided` in other words: as views that stay within the value they are taken of.

A worker has no `as_strided`, which reaches for any element of a storage by its address. Autograd uses it (an in-place
operation on a view, `stft`), so it is written here with operators that a worker has: the value is brought to one
dimension, and each dimension of the result is a row of windows on it. Every step is a view, so the result aliases the
value as `as_strided` would, and may be written through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import UsageError
from ..types import TensorType

__all__ = ["Step", "dense_order", "steps"]

_aten = torch.ops.aten
Step = tuple[Any, tuple[Any, ...]]  # an operator, and its arguments after the tensor


def steps(source: TensorType, size: Sequence[int], stride: Sequence[int], offset: int) -> list[Step]:
    """The views that lead from a value of type `source` to `as_strided(size, stride, offset)` of it. Raises
    `UsageError` if that has elements which are not the value's, or the value's own are not side by side."""
    if (tuple(size), tuple(stride), offset) == (source.shape, source.stride, source.offset):
        return []
    if len(size) != len(stride) or min((*size, *stride, offset), default=0) < 0:
        raise UsageError(f"as_strided to size {list(size)}, stride {list(stride)}, offset {offset}: no such tensor")
    flat, length = _flat(source)
    if 0 in size:
        return [*flat, (_aten.slice.Tensor, (0, 0, 0)), (_aten.view.default, (list(size),))]
    kept = [(n, step) for n, step in zip(size, stride, strict=True) if n > 1 and step > 0]
    start, extent = offset - source.offset, 1 + sum((n - 1) * step for n, step in kept)
    if start < 0 or start + extent > length:
        raise UsageError(
            f"as_strided to size {list(size)}, stride {list(stride)}, offset {offset} reaches elements that are not "
            f"this value's: it holds {length} from offset {source.offset}. Take the view of the whole tensor"
        )
    found = flat
    if extent < length:
        found = [*found, (_aten.slice.Tensor, (0, start, start + extent))]
    found = [*found, *_kept(kept, extent), *_others(size, stride)]
    return found


def dense_order(size: Sequence[int], stride: Sequence[int]) -> list[int] | None:
    """The dimensions from the widest stride to the narrowest, if in that order they are contiguous; else `None`."""
    order = sorted(range(len(size)), key=lambda dim: (-stride[dim], -size[dim]))
    order = [dim for dim in order if size[dim] != 1] + [dim for dim in order if size[dim] == 1]
    expected = 1
    for dim in reversed(order):
        if size[dim] != 1:
            if stride[dim] != expected:
                return None
            expected *= size[dim]
    return order


def _flat(source: TensorType) -> tuple[list[Step], int]:
    """The views to one dimension, and its length. What `expand` repeats is there once."""
    if 0 in source.shape:
        return [(_aten.view.default, ([-1] if len(source.shape) == 1 else [0],))], 0
    found: list[Step] = []
    size, stride = list(source.shape), list(source.stride)
    for dim in reversed(range(len(size))):
        if size[dim] > 1 and stride[dim] == 0:
            found.append((_aten.select.int, (dim, 0)))
            del size[dim], stride[dim]
    order = dense_order(size, stride)
    if order is None:
        raise UsageError(
            f"as_strided of a view of {source} with stride {list(source.stride)}, whose elements are not side by side; "
            "take the view of the whole tensor, or .contiguous() first"
        )
    if order != sorted(order):
        found.append((_aten.permute.default, (order,)))
    length = 1
    for n in size:
        length *= n
    if len(size) != 1:
        found.append((_aten.view.default, ([length],)))
    return found, length


def _kept(kept: list[tuple[int, int]], extent: int) -> list[Step]:
    """From one dimension of `extent` elements to those of more than one element: as they lie if they are dense, else
    each is a row of windows, as wide as what the others still need."""
    size, stride = [n for n, _ in kept], [step for _, step in kept]
    order = dense_order(size, stride)
    if order is not None:
        found: list[Step] = [(_aten.view.default, ([size[dim] for dim in order],))] if len(size) != 1 else []
        back = sorted(range(len(order)), key=lambda at: order[at])
        return [*found, (_aten.permute.default, (back,))] if back != sorted(back) else found
    found = []
    for n, step in kept:
        extent -= (n - 1) * step
        found.append((_aten.unfold.default, (-1, extent, step)))
    return [*found, (_aten.select.int, (-1, 0))]  # the last windows are one element wide


def _others(size: Sequence[int], stride: Sequence[int]) -> list[Step]:
    """Back come the dimensions of one element, and those that repeat one."""
    found: list[Step] = [
        (_aten.unsqueeze.default, (dim,))
        for dim, (n, step) in enumerate(zip(size, stride, strict=True))
        if n == 1 or step == 0
    ]
    if any(n > 1 and step == 0 for n, step in zip(size, stride, strict=True)):
        found.append((_aten.expand.default, (list(size),)))
    return found
