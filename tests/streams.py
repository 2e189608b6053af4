"""A host in this process and links to it, over memory and over gRPC, for the tests of streams."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from housecall.host.host import Host
from housecall.transport.grpc import Address, Listener, dial
from housecall.transport.stream import Dial
from housecall.types import Door
from housecall.wire.messages import Frame, Reply

__all__ = ["DoorWorker", "grpc_dial", "memory_dial"]


class _Stepping:
    """A door as a host wants it: it does a frame step by step."""

    def __init__(self, door: Door) -> None:
        self._door = door

    def work(self, frame: Frame) -> Iterator[None]:
        yield
        reply: Reply = self._door.handle(frame)
        return reply  # a generator's value

    def close(self) -> None:
        self._door.close()


class DoorWorker:
    """A worker each of whose sessions is the same door."""

    id = "clinic"

    def __init__(self, door: Door) -> None:
        self._door = door

    def open(self, principal: str, role: str = "scientist") -> Any:
        return _Stepping(self._door)


class _MemoryLink:
    def __init__(self, packets: Iterator[bytes]) -> None:
        self._packets = packets

    def __next__(self) -> bytes:
        return next(self._packets)

    def cancel(self) -> None:
        pass


def memory_dial(host: Host, principal: str = "alice") -> Dial:
    return lambda outgoing: _MemoryLink(host.serve(outgoing, principal))


@contextmanager
def grpc_dial(host: Host) -> Iterator[Dial]:
    listener = Listener(Address("127.0.0.1", 0, secure=False), host.serve, None, lambda context: "alice")
    try:
        yield dial(listener.address, None)
    finally:
        listener.close(0)


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}
