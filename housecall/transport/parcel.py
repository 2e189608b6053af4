"""A frame or reply as bytes and back: a head, and the blobs of its larger tensors; cut into packets and put
together again. Both halves of each are here, and none of it knows a network.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch

from ..errors import CodecError
from ..wire.codec import blob_sizes, decode, encode, with_arrays
from ..wire.messages import Array, Blob, Frame, Reply
from ..wire.packets import CONTROL, MORE, Begin, packets, read_begin
from .arrays import pack, unpack

__all__ = ["Assembler", "Parcel", "is_control", "packed"]

INLINE = 4096  # elements of at most so many bytes travel within the head
MAX_BLOB_BYTES = 1 << 33  # of the tensors of one frame or reply together, unless a smaller limit is given

Body = TypeVar("Body", Frame, Reply)


class Parcel:
    """A frame or reply ready to travel. Its blobs are views of the tensors: nothing is copied until it leaves."""

    __slots__ = ("blobs", "head", "nbytes", "number")

    def __init__(self, number: int, head: bytes, blobs: list[memoryview]) -> None:
        self.number = number
        self.head = head
        self.blobs = blobs
        self.nbytes = len(head) + sum(map(len, blobs))

    def packets(self, acknowledged: int) -> Iterator[bytes]:
        """Its packets, beginning anew at each call: a parcel may have to be sent again."""
        return packets(self.number, acknowledged, (self.head, *self.blobs))


def packed(body: Body) -> Parcel:
    """The parcel of a frame or reply that holds tensors. Raises `CodecError` for a tensor that does not travel."""
    blobs: list[memoryview] = []

    def put(array: Array) -> Array:
        flat = pack(array)
        if len(flat.data) <= INLINE:
            return flat
        blobs.append(flat.data)
        return Array(flat.type, Blob(len(flat.data)))

    return Parcel(body.number, encode(with_arrays(body, put)), blobs)


class Assembler(Generic[Body]):
    """Puts packets together; says for each whether that made a whole. One for each stream and direction.

    Raises `CodecError` for packets that no honest peer would send. Memory is taken only for blobs whose sizes
    agree with their types and, together, with `limit` bytes."""

    def __init__(self, kind: type[Body], limit: int = MAX_BLOB_BYTES) -> None:
        self._kind: type[Body] = kind
        self._limit = limit
        self.nbytes = 0  # of the whole that came last
        self._begun: Begin | None = None
        self._head = bytearray()
        self._body: Body | None = None
        self._blobs: list[torch.Tensor] = []
        self._whole = 0  # how many of the blobs are complete
        self._filled = 0  # bytes of the one after them

    def feed(self, packet: bytes) -> tuple[Begin, Body] | None:
        """Take the next packet: the first packet's header and the whole when it is complete, else `None`."""
        payload = memoryview(packet)[1:]
        if self._begun is None:
            self._begun = read_begin(packet)
            payload = self._begun.payload
        elif not packet or packet[0] != MORE:
            raise CodecError(f"message {self._begun.number} was cut off by another")
        payload = self._take_head(self._begun, payload)
        while len(payload) and self._whole < len(self._blobs):
            payload = self._take_blob(payload)
        if len(payload):
            raise CodecError(f"message {self._begun.number} is followed by {len(payload):,} bytes that it did not name")
        if self._body is None or self._whole < len(self._blobs):
            return None
        return self._finished(self._begun, self._body)

    def _take_head(self, begun: Begin, payload: memoryview) -> memoryview:
        missing = begun.head_bytes - len(self._head)
        if self._body is None:
            self._head += payload[:missing]
            if len(self._head) == begun.head_bytes:
                self._body = decode(self._head, self._kind)
                self._blobs = self._allocated(blob_sizes(self._body))
            return payload[missing:]
        return payload

    def _allocated(self, sizes: list[int]) -> list[torch.Tensor]:
        if min(sizes, default=1) < 1:
            raise CodecError("a blob of no bytes: such elements travel within the message")
        if sum(sizes) > self._limit:
            raise CodecError(f"tensors of {sum(sizes):,} bytes in one message; at most {self._limit:,} are allowed")
        try:
            return [torch.empty(size, dtype=torch.uint8) for size in sizes]
        except RuntimeError:
            raise CodecError(f"no memory here for tensors of {sum(sizes):,} bytes") from None

    def _take_blob(self, payload: memoryview) -> memoryview:
        blob = self._blobs[self._whole]
        count = min(len(payload), len(blob) - self._filled)
        memoryview(blob.numpy().data)[self._filled : self._filled + count] = payload[:count]
        self._filled += count
        if self._filled == len(blob):
            self._whole, self._filled = self._whole + 1, 0
        return payload[count:]

    def _finished(self, begun: Begin, body: Body) -> tuple[Begin, Body]:
        blobs = iter(self._blobs)

        def opened(array: Array) -> Array:
            data: Any = next(blobs) if isinstance(array.data, Blob) else array.data
            return Array(None, unpack(Array(array.type, data)))

        if body.number != begun.number:
            raise CodecError(f"packet {begun.number} brought message {body.number}")
        whole = with_arrays(body, opened)
        self.nbytes = begun.head_bytes + sum(map(len, self._blobs))
        self._begun, self._body, self._head, self._blobs, self._whole = None, None, bytearray(), [], 0
        return begun, whole


def is_control(packet: bytes) -> bool:
    """Whether a packet is a control message."""
    return bool(packet) and packet[0] == CONTROL
