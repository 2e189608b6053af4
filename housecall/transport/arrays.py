"""torch tensor <-> `Array`: exactly the elements of the tensor, never the rest of its storage.

NOTE [What travels]
A view of ten rows must not carry the other thousand (the classic library sent them all). A tensor that fills
its storage travels as it lies there, with its strides; a repeated dimension (stride 0) travels once; any
other view is compacted first, to the strides that `clone` gives it. The conjugate and negative bits travel
as bits. What arrives always starts at offset 0 of a storage of its own.

NOTE [Copy on write]
Within one process a copy is made when somebody writes (`torch._lazy_clone`), and by nobody if the other side
has let go of the tensor by then: that is how a model that is sent, updated and fetched costs no copy at all.
Writing through a numpy array that was taken from the tensor *before* it was sent goes past torch and is not
seen: take the array afterwards.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from ..errors import CodecError
from ..program.typing import symbol, type_of
from ..types import TensorType
from ..wire.codec import ITEM_BYTES, check_array
from ..wire.messages import Array

__all__ = ["own", "pack", "share", "unpack"]


# torch answers 0 for "no two elements share memory", 1 for "some do", 2 for "too hard to say".
_NONE, _SOME = 0, 1
_address: Any = torch._C._data_address  # type: ignore[attr-defined]  # there, but not in torch's stubs
_overlap = torch._debug_has_internal_overlap


def own(tensor: torch.Tensor, *, dense: bool = False) -> torch.Tensor:
    """The same values in a storage that holds nothing else; a copy is deferred where it can be. `dense`: it is known
    that they lie side by side from the start of their storage on, as they are."""
    if not dense and (tensor.is_neg() or tensor.is_conj()):
        bits = _with_bits(tensor.detach(), conj=False, neg=False)
        return _with_bits(own(bits), conj=tensor.is_conj(), neg=tensor.is_neg())
    fills = tensor.untyped_storage().nbytes() == tensor.nbytes
    if fills and tensor.is_cpu and (dense or tensor.is_contiguous() or _overlap(tensor) == _NONE):
        try:
            return torch._lazy_clone(tensor)
        except RuntimeError:  # a storage that torch did not allocate (numpy's, a mapped file's) cannot be shared
            return tensor.clone()
    if tensor.is_contiguous():
        return tensor.clone()
    if _overlap(tensor) == _SOME:
        once = tensor
        for dim, stride in enumerate(tensor.stride()):
            once = once.narrow(dim, 0, 1) if stride == 0 else once
        return own(once).expand(tensor.shape)
    return tensor.clone()


def _with_bits(tensor: torch.Tensor, *, conj: bool, neg: bool) -> torch.Tensor:
    if tensor.is_conj() != conj:
        torch._C._set_conj(tensor, conj)
    if tensor.is_neg() != neg:
        torch._C._set_neg(tensor, neg)
    return tensor


def share(tensor: torch.Tensor, *, dense: bool = False) -> Array:
    """An array for the same process: the tensor itself, copied on write. It knows its own type. `dense`: see `own`."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        tensor = tensor.detach()
    return Array(None, own(tensor, dense=dense))


def pack(array: Array) -> Array:
    """The same array with its elements as bytes, for the wire: a view of them, copied by nobody."""
    dtype = str(array.data.dtype).removeprefix("torch.")
    if dtype not in ITEM_BYTES:
        raise CodecError(f"a tensor of dtype {dtype} does not travel; convert it first, with .to(dtype)")
    value: torch.Tensor = own(array.data if array.data.is_cpu else array.data.cpu())
    kept = type_of(value)
    bits = _with_bits(value.detach(), conj=False, neg=False)
    return Array(kept, _elements(bits) if 0 not in kept.shape else b"")


def _elements(tensor: torch.Tensor) -> memoryview:
    """The bytes of a storage, to be read only. Asking torch for a pointer to write through would copy what is
    shared copy-on-write, so it is asked for the other one; the memory lives as long as the view does."""
    held = (ctypes.c_char * tensor.untyped_storage().nbytes()).from_address(_address(tensor))
    held.tensor = tensor  # type: ignore[attr-defined]  # a ctypes object takes attributes, and lives with its view
    return memoryview(held).cast("B").toreadonly()


def unpack(array: Array) -> torch.Tensor:
    """The tensor of an array that came from outside. Raises `CodecError` before anything is allocated.

    Elements that came as a blob, in a buffer of torch's (bytes), become the tensor's own memory; others are copied."""
    type_ = check_array(array)
    stored = len(array.data) // ITEM_BYTES[type_.dtype]
    extent = _extent(type_)
    if extent > stored:  # gaps between the elements: only a dense tensor is ever sent
        raise CodecError(f"{type_} with stride {type_.stride} needs {extent} elements of storage, {stored} came")
    try:
        return _made(type_, array.data)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:  # a type no tensor can have
        raise CodecError(f"{type_} with stride {type_.stride} is no tensor's type: {error}") from None


def _made(type_: TensorType, data: bytes | torch.Tensor) -> torch.Tensor:
    dtype = symbol("dtype", type_.dtype)
    if not len(data):
        return _with_bits(
            torch.empty(0, dtype=dtype).new_empty_strided(type_.shape, type_.stride), conj=type_.conj, neg=type_.neg
        )
    # Cloned, since memory that torch did not allocate cannot be shared copy-on-write.
    buffer = data if isinstance(data, torch.Tensor) else torch.frombuffer(bytearray(data), dtype=torch.uint8).clone()
    value = buffer.view(dtype).as_strided(type_.shape, type_.stride)
    return _with_bits(value, conj=type_.conj, neg=type_.neg)


def _extent(type_: TensorType) -> int:
    if 0 in type_.shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(type_.shape, type_.stride, strict=True))
