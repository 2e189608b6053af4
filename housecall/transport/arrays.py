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

import torch

from ..errors import CodecError
from ..program.typing import symbol, type_of
from ..types import TensorType
from ..wire.codec import ITEM_BYTES, check_array
from ..wire.messages import Array

__all__ = ["own", "pack", "share", "unpack"]


# torch answers 0 for "no two elements share memory", 1 for "some do", 2 for "too hard to say".
_NONE, _SOME = 0, 1
_overlap = torch._debug_has_internal_overlap


def own(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in a storage that holds nothing else; a copy is deferred where it can be."""
    if tensor.is_neg() or tensor.is_conj():
        bits = _with_bits(tensor.detach(), conj=False, neg=False)
        return _with_bits(own(bits), conj=tensor.is_conj(), neg=tensor.is_neg())
    fills = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    if fills and tensor.is_cpu and (tensor.is_contiguous() or _overlap(tensor) == _NONE):
        try:
            return torch._lazy_clone(tensor)
        except RuntimeError:  # a storage that torch did not allocate (numpy's, a mapped file's) cannot be shared
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


def share(tensor: torch.Tensor) -> Array:
    """An array for the same process: the tensor itself, copied on write. It knows its own type."""
    return Array(None, own(tensor.detach() if tensor.requires_grad else tensor))


def pack(array: Array) -> Array:
    """The same array with its elements as bytes, for the wire."""
    dtype = str(array.data.dtype).removeprefix("torch.")
    if dtype not in ITEM_BYTES:
        raise CodecError(f"a tensor of dtype {dtype} does not travel; convert it first, with .to(dtype)")
    value: torch.Tensor = own(array.data)
    kept = type_of(value)
    bits = _with_bits(value.detach(), conj=False, neg=False)
    stored = bits.untyped_storage().nbytes() // bits.element_size() if 0 not in kept.shape else 0
    flat = bits.as_strided((stored,), (1,)).cpu()
    return Array(kept, flat.view(torch.uint8).numpy().tobytes())


def unpack(array: Array) -> torch.Tensor:
    """The tensor of an array that came from outside. Raises `CodecError` before anything is allocated."""
    type_, data = check_array(array)
    stored = len(data) // ITEM_BYTES[type_.dtype]
    extent = _extent(type_)
    if extent > stored:  # gaps between the elements: only a dense tensor is ever sent
        raise CodecError(f"{type_} with stride {type_.stride} needs {extent} elements of storage, {stored} came")
    try:
        return _made(type_, data, stored)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:  # a type no tensor can have
        raise CodecError(f"{type_} with stride {type_.stride} is no tensor's type: {error}") from None


def _made(type_: TensorType, data: memoryview, stored: int) -> torch.Tensor:
    dtype = symbol("dtype", type_.dtype)
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if stored else torch.empty(0, dtype=dtype)
    value = flat.as_strided(type_.shape, type_.stride) if stored else flat.new_empty_strided(type_.shape, type_.stride)
    return _with_bits(value, conj=type_.conj, neg=type_.neg)


def _extent(type_: TensorType) -> int:
    if 0 in type_.shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(type_.shape, type_.stride, strict=True))
