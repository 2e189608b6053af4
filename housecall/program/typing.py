"""torch's objects <-> their names, and the meta tensor that stands for a type where only shapes matter.

Closed tables both ways: a name from outside is looked up here or refused.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..errors import ProgramError
from ..types import TensorType

__all__ = ["DTYPES", "address_of", "meta", "parts_of", "symbol", "type_in_parts", "type_of"]

# The address of a tensor's storage: equal for all that share it, while one of them lives.
address_of: Any = torch._C._storage_address  # type: ignore[attr-defined]  # there, but not in torch's stubs

DTYPES: dict[str, torch.dtype] = {
    str(value).removeprefix("torch."): value for value in vars(torch).values() if type(value) is torch.dtype
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SYMBOLS: dict[str, dict[str, Any]] = {
    "dtype": dict(DTYPES),
    "layout": {"strided": torch.strided},
    "memory_format": {
        str(value).removeprefix("torch."): value
        for value in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
    },
}


def symbol(kind: str, name: str) -> Any:
    """torch's own object for a `Symbol`. Raises `ProgramError` for a name outside the closed tables."""
    if kind == "device":
        where, _, index = name.partition(":")
        if where in ("cpu", "cuda", "meta") and (not index or index.isdigit()):
            return torch.device(name)
    elif name in _SYMBOLS.get(kind, ()):
        return _SYMBOLS[kind][name]
    raise ProgramError(f"unknown {kind} '{name}'")


def type_of(tensor: torch.Tensor) -> TensorType:
    """The type of a tensor of strided layout."""
    return type_in_parts(*parts_of(tensor))


def parts_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """The parts of its type, as torch gives them."""
    return (
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.storage_offset(),
        tensor.device,
        tensor.is_conj(),
        tensor.is_neg(),
    )


@functools.lru_cache(maxsize=1 << 16)
def type_in_parts(
    dtype: torch.dtype,
    shape: torch.Size,
    stride: tuple[int, ...],
    offset: int,
    device: torch.device,
    conj: bool,
    neg: bool,
) -> TensorType:
    """The type of these parts."""
    return TensorType(_NAMES[dtype], tuple(shape), stride, offset, str(device), conj, neg)


def meta(type_: TensorType) -> torch.Tensor:
    """A tensor of this type without elements: operators run on it find the types of their results."""
    extent = type_.offset + 1 + sum((n - 1) * s for n, s in zip(type_.shape, type_.stride, strict=True))
    base = torch.empty(0 if 0 in type_.shape else extent, dtype=symbol("dtype", type_.dtype), device="meta")
    if 0 in type_.shape:
        value = base.new_empty_strided(type_.shape, type_.stride)
    else:
        value = base.as_strided(type_.shape, type_.stride, type_.offset)
    if type_.conj:
        torch._C._set_conj(value, True)
    if type_.neg:
        torch._C._set_neg(value, True)
    return value
