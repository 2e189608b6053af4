"""Packets: how a frame or a reply is cut for a stream that carries messages of at most `MAX_PACKET` bytes.

    packet   ::= kind (1 byte), rest
    CONTROL  ::= 0x00, a control message (`messages.Control`)
    BEGIN    ::= 0x01, number (u64), acknowledged (u64), head length (u64), then payload
    MORE     ::= 0x02, payload

All integers are little-endian. The payloads of one BEGIN and the MOREs after it are the head (a frame or reply
in MessagePack) and its blobs, back to back in the order in which the head names them; how many there are follows
from the head. `acknowledged` is the number of the last frame or reply that came from the other side.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from ..errors import CodecError
from .codec import MAX_HEAD_BYTES, decode_control, encode
from .messages import Control

__all__ = [
    "BEGIN",
    "CONTROL",
    "MAX_PACKET",
    "MORE",
    "Begin",
    "begin",
    "control",
    "packets",
    "read_begin",
    "read_control",
]

MAX_PACKET = 1 << 20
CONTROL, BEGIN, MORE = 0, 1, 2
_BEGIN = struct.Struct("<BQQQ")


class Begin(NamedTuple):
    """What the first packet of a frame or reply says, and the payload it brings."""

    number: int
    acknowledged: int
    head_bytes: int
    payload: memoryview


def control(message: Control) -> bytes:
    """The packet of a control message."""
    return bytes((CONTROL,)) + encode(message)


def read_control(packet: bytes | memoryview) -> Control:
    """The control message of a packet. Raises `CodecError` for any other packet."""
    if not len(packet) or packet[0] != CONTROL:
        raise CodecError(f"expected a control packet, found {_kind(packet)}")
    return decode_control(memoryview(packet)[1:])


def begin(number: int, acknowledged: int, head_bytes: int) -> bytes:
    """The header of the first packet of a frame or reply."""
    return _BEGIN.pack(BEGIN, number, acknowledged, head_bytes)


def read_begin(packet: bytes | memoryview) -> Begin:
    """The first packet of a frame or reply. Raises `CodecError` for any other, and for a head beyond its limit."""
    if len(packet) < _BEGIN.size or packet[0] != BEGIN:
        raise CodecError(f"expected the first packet of a message, found {_kind(packet)}")
    _, number, acknowledged, head_bytes = _BEGIN.unpack_from(packet)
    if head_bytes > MAX_HEAD_BYTES:
        raise CodecError(
            f"a message of {head_bytes:,} bytes; at most {MAX_HEAD_BYTES:,} are allowed beside its tensors"
        )
    return Begin(number, acknowledged, head_bytes, memoryview(packet)[_BEGIN.size :])


def packets(number: int, acknowledged: int, parts: tuple[bytes | memoryview, ...]) -> Iterator[bytes]:
    """The packets of one frame or reply; `parts` are its head and its blobs. Cut as late as they are asked for, so
    that a large tensor is in memory once."""
    packet = bytearray(begin(number, acknowledged, len(parts[0])))
    for part in parts:
        view = memoryview(part)
        while len(view):
            room = MAX_PACKET - len(packet)
            if len(view) < room:
                packet += view
                break
            yield b"".join((packet, view[:room]))
            view = view[room:]
            packet = bytearray((MORE,))
    if len(packet) > 1:
        yield bytes(packet)


def _kind(packet: bytes | memoryview) -> str:
    return f"a packet of kind {packet[0]}" if len(packet) else "an empty packet"
