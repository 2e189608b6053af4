"""A frame or reply as bytes and back: a head, and the blobs of its larger tensors; cut into packets and put
together again. Both halves of each are here, and none of it knows a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import msgspec
import torch

from ..errors import CodecError
from ..wire.codec import MAX_HEAD_BYTES, blob_sizes, decode, encode, with_arrays
from ..wire.messages import Array, Blob, Failure, Frame, Reply
from ..wire.packets import CONTROL, MORE, Begin, packets, read_begin
from .arrays import pack, unpack

__all__ = ["HEAD_COST", "Assembler", "HeadTooLong", "Parcel", "is_control", "packed", "packed_reply"]

INLINE = 4096  # elements of at most so many bytes travel within the head
INLINE_TOGETHER = 1 << 20  # and of one head together; what is more follows it
# What is left of a reply that was too long: failures, characters of each text in them, and writes not done.
FAILURES, BRIEF, UNDONE = 2_000, 200, 10_000
HEAD_COST = 40  # bytes of memory that one of a head can become: 1 byte of MessagePack is a float in a tuple
MAX_BLOB_BYTES = 1 << 33  # of the tensors of one frame or reply together, unless a smaller limit is given

Body = TypeVar("Body", Frame, Reply)


class HeadTooLong(CodecError):
    """A frame or reply that says more than one can, beside the elements of its tensors: it has to be cut in two."""


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
    """The parcel of a frame or reply that holds tensors. Raises `CodecError` for a tensor that does not travel, and
    `HeadTooLong`."""
    blobs: list[memoryview] = []
    inline = 0

    def put(array: Array) -> Array:
        nonlocal inline
        flat = pack(array)
        size = len(flat.data)
        if not size or (size <= INLINE and inline + size <= INLINE_TOGETHER):
            inline += size
            return flat
        blobs.append(flat.data)
        return Array(flat.type, Blob(size))

    head = encode(with_arrays(body, put))
    if len(head) > MAX_HEAD_BYTES:
        raise HeadTooLong(
            f"a {type(body).__name__} of {len(head):,} bytes beside the elements of its tensors; at most "
            f"{MAX_HEAD_BYTES:,} travel"
        )
    return Parcel(body.number, head, blobs)


def packed_reply(reply: Reply) -> Parcel:
    """The parcel of a reply, whatever is in it: what does not travel is said in its place, so that the session goes
    on."""
    try:
        return packed(reply)
    except Exception as error:  # a dtype that does not travel, no memory for a copy, more answers than a head holds
        why = Failure(0, 0, "fetch", str(error), writes=True)
    told = (*map(_brief, reply.failures[:FAILURES]), why)
    return packed(Reply(reply.number, (), told, reply.undone[:UNDONE]))


def _brief(failure: Failure) -> Failure:
    return msgspec.structs.replace(failure, operator=failure.operator[:BRIEF], reason=failure.reason[:BRIEF])


def _unasked(nbytes: int) -> None:
    """Whoever trusts the sender has room for all that the limits allow."""


class Assembler(Generic[Body]):
    """Puts packets together; says for each whether that made a whole. One for each stream and direction.

    Raises `CodecError` for packets that no honest peer would send. Memory is taken only for blobs whose sizes
    agree with their types and, together, with `limit` bytes. Before it is taken, `head_room` and `blob_room` are told
    how much that will be; they may wait, or raise."""

    def __init__(
        self,
        kind: type[Body],
        limit: int = MAX_BLOB_BYTES,
        *,
        head_room: Callable[[int], None] = _unasked,
        blob_room: Callable[[int], None] = _unasked,
    ) -> None:
        self._kind: type[Body] = kind
        self._limit = limit
        self._head_room, self._blob_room = head_room, blob_room
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
            self._head_room(HEAD_COST * self._begun.head_bytes)
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
        if sizes:
            self._blob_room(sum(sizes))
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
