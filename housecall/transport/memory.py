"""A worker in the same process: the same messages as on the wire, without the wire.

NOTE [Whose thread]
Two threads that both run Python fight for the interpreter lock, and small operators lose most of their time
to it. So the caller's own thread runs the frames of the worker she waits for. Only when *several* workers
have work does a thread start for each of the others (`start`): there large operators, which leave the lock,
overlap. A caller who issues and never waits pays for one frame each time `BACKLOG` of them are queued.

While several run, each takes its share of the intra-op threads; afterwards each puts the setting back, since
torch keeps part of it for the whole process.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch

from ..errors import WorkerGone
from ..types import Door
from ..wire.messages import Frame, Reply
from .parcel import Assembler, Parcel, packed, packed_reply
from .whole import whole

__all__ = ["BACKLOG", "MemoryTransport"]

BACKLOG = 8

Body = TypeVar("Body", Frame, Reply)


class MemoryTransport:
    """A `Transport` to a `Door` in this process.

    `codec=True` puts every frame and reply through bytes and back: what a remote worker would have seen.
    """

    frame_messages = 256
    frame_bytes = 1 << 62
    remote = False

    def __init__(self, door: Door, *, name: str = "worker", codec: bool = False) -> None:
        self._door = door
        self._name = name
        self._codec = codec
        self._frames: deque[Frame] = deque()
        self._replies: deque[Reply] = deque()
        self._turn = threading.Lock()  # held by whoever runs a frame: frames run one by one, in order
        self._owed = 0
        self._thread: threading.Thread | None = None
        self._closed = False

    def send(self, frame: Frame) -> None:
        """Queue a frame; beyond `BACKLOG` of them, run the oldest here and now."""
        if self._closed:
            raise WorkerGone(f"worker '{self._name}' is closed; its values are gone. Make a new worker and send anew")
        if self._codec:
            frame = _arrived(packed(frame), Frame)
        self._owed += 1
        self._frames.append(frame)
        if len(self._frames) > BACKLOG:
            self._run_one()

    def start(self) -> None:
        """Run what is queued on a thread of its own."""
        if self._frames and (self._thread is None or not self._thread.is_alive()):
            full = torch.get_num_threads()
            self._thread = threading.Thread(
                target=self._run_all, args=(full,), name=f"housecall-{self._name}", daemon=True
            )
            _background.add(self._thread)
            self._thread.start()

    def wait(self) -> None:
        """Nothing to do: what is received runs then."""

    def receive(self) -> Reply:
        """The next reply; runs frames on this thread until there is one."""
        if not self._owed:
            raise WorkerGone(f"worker '{self._name}' owes no reply")
        with _sharing(torch.get_num_threads()) if _background else nullcontext():
            while not self._replies:
                if not self._run_one() and not self._replies:
                    raise WorkerGone(f"worker '{self._name}' lost a frame; its state is unknown. Make a new worker")
        self._owed -= 1
        return self._replies.popleft()

    def close(self) -> None:
        """End the session once the frame under way has ended."""
        if not self._closed:
            self._closed = True
            self._frames.clear()
            with self._turn:
                self._door.close()

    def _run_one(self) -> bool:
        """Run the oldest frame, unless none is left; waits for the thread that is running one."""
        with self._turn:
            try:
                frame = self._frames.popleft()
            except IndexError:
                return False
            with whole():
                reply = self._door.handle(frame)
                self._replies.append(_arrived(packed_reply(reply), Reply) if self._codec else reply)
            return True

    def _run_all(self, full: int) -> None:
        try:
            with _sharing(full):
                while self._run_one():
                    pass
        finally:
            _background.discard(threading.current_thread())


_background: set[threading.Thread] = set()  # at work now


@contextmanager
def _sharing(full: int) -> Iterator[None]:
    """Within: this thread's share of `full` intra-op threads, beside the background threads at work."""
    torch.set_num_threads(max(1, full // (len(_background) + 1)))
    try:
        yield
    finally:
        torch.set_num_threads(full)


def _arrived(parcel: Parcel, kind: type[Body]) -> Body:
    """What a parcel brings, after it went through packets."""
    assembler = Assembler(kind)
    for packet in parcel.packets(acknowledged=0):
        arrived = assembler.feed(packet)
    assert arrived is not None
    return arrived[1]
