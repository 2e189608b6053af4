"""Messages <-> bytes: MessagePack for the structure, raw little-endian bytes for elements; no pickle, no names.

This file decides what bytes may mean, whichever transport will carry them. A tensor's
`data` is a MessagePack binary of exactly `elements * item size` bytes; anything else is refused before torch
sees it. Every decoding failure is one `CodecError`.
"""

from __future__ import annotations

import math
from typing import TypeVar

import msgspec

from ..errors import CodecError
from ..types import TensorType
from .messages import Array, Frame, Reply

__all__ = ["ITEM_BYTES", "MAX_FRAME_BYTES", "check_array", "decode", "encode"]

MAX_FRAME_BYTES = 1 << 31

# The closed table of dtypes that travel, with the size of an element in bytes.
ITEM_BYTES = {
    "bool": 1, "uint8": 1, "int8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "uint16": 2, "int16": 2, "float16": 2, "bfloat16": 2,
    "uint32": 4, "int32": 4, "float32": 4, "complex32": 4,
    "uint64": 8, "int64": 8, "float64": 8, "complex64": 8,
    "complex128": 16,
}  # fmt: skip

Body = TypeVar("Body", Frame, Reply)

_ENCODER = msgspec.msgpack.Encoder()
_DECODERS: dict[type, msgspec.msgpack.Decoder[Frame] | msgspec.msgpack.Decoder[Reply]] = {
    Frame: msgspec.msgpack.Decoder(Frame),
    Reply: msgspec.msgpack.Decoder(Reply),
}


def encode(body: Frame | Reply) -> bytes:
    """The bytes of a frame or reply whose arrays hold bytes."""
    return _ENCODER.encode(body)


def decode(data: bytes, body: type[Body]) -> Body:
    """A frame or reply from bytes. Raises `CodecError` for anything else, and for arrays of the wrong size."""
    if len(data) > MAX_FRAME_BYTES:
        raise CodecError(f"a frame of {len(data):,} bytes; at most {MAX_FRAME_BYTES:,} are allowed")
    try:
        found = _DECODERS[body].decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        # msgspec lets UnicodeDecodeError out beside its own class; to a peer both are the same mistake.
        raise CodecError(f"not a {body.__name__}: {error}") from None
    return found  # type: ignore[return-value]  # _DECODERS maps each class to its own decoder


def check_array(array: Array) -> tuple[TensorType, memoryview]:
    """Type and elements of an array that came from outside. Raises `CodecError` for a lie about its size."""
    if array.type is None:
        raise CodecError("an array came without its type")
    elements = _elements(array.type)
    if not isinstance(array.data, bytes | bytearray | memoryview):
        raise CodecError(f"the elements of {array.type} came as {type(array.data).__name__}, expected bytes")
    expected = elements * ITEM_BYTES[array.type.dtype]
    if len(array.data) != expected:
        raise CodecError(f"{array.type} came with {len(array.data):,} bytes, expected {expected:,}")
    return array.type, memoryview(array.data)


def _elements(type_: TensorType) -> int:
    """How many elements travel: a dimension of stride 0 repeats what is there, so it travels once."""
    if type_.dtype not in ITEM_BYTES:
        raise CodecError(f"unknown dtype '{type_.dtype}'")
    numbers = (*type_.shape, *type_.stride, type_.offset)
    if len(type_.shape) != len(type_.stride) or min(numbers, default=0) < 0 or len(type_.shape) > 64:
        raise CodecError(f"{type_} with stride {type_.stride} and offset {type_.offset} is no tensor's type")
    if type_.conj and not type_.dtype.startswith("complex"):
        raise CodecError(f"{type_} has the conjugate bit, which only complex tensors have")
    if 0 in type_.shape:
        return 0
    return math.prod(n for n, s in zip(type_.shape, type_.stride, strict=True) if s != 0)
