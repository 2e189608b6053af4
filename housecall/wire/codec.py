"""Messages <-> bytes: MessagePack for the structure, raw little-endian bytes for elements; no pickle, no names.

This file decides what bytes may mean, whichever transport carries them. The elements of a tensor are exactly
`elements * item size` bytes, within the message or after it; anything else is refused before torch sees it and
before anything is allocated. Every decoding failure is one `CodecError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec

from ..errors import CodecError
from ..types import TensorType
from .messages import (
    Array,
    Blob,
    Control,
    Found,
    Frame,
    Message,
    Mocked,
    Put,
    Reply,
    Result,
    Seed,
    Types,
    Updated,
    Value,
)

__all__ = [
    "ITEM_BYTES",
    "MAX_DIMS",
    "MAX_HEAD_BYTES",
    "arrays",
    "blob_sizes",
    "check_array",
    "decode",
    "decode_control",
    "encode",
    "with_arrays",
]

# Of a frame without its blobs: some 80,000 calls. More would hold up every other session while it is decoded.
MAX_HEAD_BYTES = 4 << 20
MAX_DIMS = 64  # torch's own limit
_QUOTED = 300  # characters of a peer's text that an error repeats: errors are logged, and sent back

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
_DECODERS: dict[Any, msgspec.msgpack.Decoder[Any]] = {
    Frame: msgspec.msgpack.Decoder(Frame),
    Reply: msgspec.msgpack.Decoder(Reply),
    Control: msgspec.msgpack.Decoder(Control),
}


def encode(body: Frame | Reply | Control) -> bytes:
    """The bytes of a frame, a reply or a control message; the elements of its arrays are bytes or a `Blob`.
    Raises `CodecError` for what has no bytes: an integer beyond 64 bits, half of a surrogate pair."""
    try:
        return _ENCODER.encode(body)
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError, OverflowError) as error:
        raise CodecError(f"a {type(body).__name__} that does not travel: {_brief(str(error))}") from None


def decode(data: bytes | bytearray | memoryview, body: type[Body]) -> Body:
    """A frame or reply from bytes. Raises `CodecError` for anything else."""
    if len(data) > MAX_HEAD_BYTES:
        raise CodecError(f"a {body.__name__} of {len(data):,} bytes; at most {MAX_HEAD_BYTES:,} are allowed")
    return _decoded(data, body, body.__name__)  # type: ignore[no-any-return]  # _DECODERS maps each class to its own


def decode_control(data: bytes | memoryview) -> Control:
    """A control message from bytes. Raises `CodecError` for anything else."""
    return _decoded(data, Control, "control message")  # type: ignore[no-any-return]  # as above


def _decoded(data: bytes | bytearray | memoryview, kind: Any, name: str) -> Any:
    try:
        return _DECODERS[kind].decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        # msgspec lets UnicodeDecodeError out beside its own class; to a peer both are the same mistake.
        raise CodecError(f"not a {name}: {_brief(str(error))}") from None


def _brief(text: str) -> str:
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."


# -- the arrays of a frame or reply -----------------------------------------------------------------------


def arrays(body: Frame | Reply) -> Iterator[Array]:
    """Every array that a frame or reply holds, in order."""
    for item in body.messages if isinstance(body, Frame) else body.results:
        if isinstance(item, Put):
            yield item.value
        elif isinstance(item, Seed):
            yield item.state
        elif isinstance(item, Value):
            yield from (array for array in item.arrays if isinstance(array, Array))
        elif isinstance(item, Mocked):
            yield from item.columns
        elif isinstance(item, Updated):
            yield from item.arrays


def with_arrays(body: Body, change: Callable[[Array], Array]) -> Body:
    """The same frame or reply with each array changed, in order."""
    if isinstance(body, Frame):
        messages = tuple([_changed(message, change) for message in body.messages])
        return Frame(body.number, messages)  # type: ignore[return-value]  # a Body that is a Frame
    results = tuple([_changed_result(result, change) for result in body.results])
    return Reply(body.number, results, body.failures, body.undone)


def _changed(message: Message, change: Callable[[Array], Array]) -> Message:
    kind = type(message)
    if kind is Put:
        return Put(message.id, change(message.value))  # type: ignore[union-attr]  # `kind` says it is a Put
    if kind is Seed:
        return Seed(change(message.state))  # type: ignore[union-attr]  # as above
    return message


def _changed_result(result: Result, change: Callable[[Array], Array]) -> Result:
    if isinstance(result, Value):
        return Value(tuple([change(item) if isinstance(item, Array) else item for item in result.arrays]))
    if isinstance(result, Mocked):
        return Mocked(tuple([change(column) for column in result.columns]))
    if isinstance(result, Updated):
        return Updated(tuple([change(array) for array in result.arrays]), result.left)
    return result


def blob_sizes(body: Frame | Reply) -> list[int]:
    """Check every type and array; the sizes of the blobs that follow, in bytes. Raises `CodecError` for a lie."""
    for type_ in _types(body):
        _check_layout(type_)
    sizes = []
    for array in arrays(body):
        check_array(array)
        if isinstance(array.data, Blob):
            sizes.append(array.data.size)
    return sizes


def _types(body: Frame | Reply) -> Iterator[TensorType]:
    """The types that come without elements."""
    for result in body.results if isinstance(body, Reply) else ():
        if isinstance(result, Types):
            yield from (item for item in result.types if isinstance(item, TensorType))
        elif isinstance(result, Found):
            yield from (item.tensor for item in result.slots)


def check_array(array: Array) -> TensorType:
    """The type of an array that came from outside. Raises `CodecError` for a lie about its size."""
    if array.type is None:
        raise CodecError("an array came without its type")
    expected = _elements(array.type) * ITEM_BYTES[array.type.dtype]
    found = array.data.size if isinstance(array.data, Blob) else len(array.data)
    if found != expected:
        raise CodecError(f"{_brief(str(array.type))} came with {found:,} bytes, expected {expected:,}")
    return array.type


def _elements(type_: TensorType) -> int:
    """How many elements travel: a dimension of stride 0 repeats what is there, so it travels once."""
    if type_.dtype not in ITEM_BYTES:
        raise CodecError(f"unknown dtype '{_brief(type_.dtype)}'")
    _check_layout(type_)
    if 0 in type_.shape:
        return 0
    return math.prod(n for n, s in zip(type_.shape, type_.stride, strict=True) if s != 0)


def _check_layout(type_: TensorType) -> None:
    dims, strides = len(type_.shape), len(type_.stride)
    if dims != strides or dims > MAX_DIMS:
        raise CodecError(
            f"{dims:,} dimensions with {strides:,} strides is no tensor's type: one for each, at most {MAX_DIMS}"
        )
    if min((*type_.shape, *type_.stride, type_.offset)) < 0:
        raise CodecError(
            f"shape {type_.shape} with stride {type_.stride} and offset {type_.offset} is no tensor's type: a number "
            "is negative"
        )
    if type_.conj and not type_.dtype.startswith("complex"):
        raise CodecError(f"{_brief(str(type_))} has the conjugate bit, which only complex tensors have")
