"""The worker behind a wire: its sessions, their leases, their breaks and resumptions, the end of it all.

`serve` is the worker's side of one stream: packets in, packets out, whichever network carries them. A *seat* is a
session's place here; it outlives the streams that reach it, until its client says goodbye, its lease ends, or the
worker does. What a stream brings goes to the seat's inbox, the seat takes its turn, and its replies stay until
they are acknowledged.

Everything that arrives is read as an attacker's: a peer that breaks the protocol loses its session, nobody else
notices. Only the principal that opened a session can resume it, and a wrong token is answered like one that has
expired.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import ProtocolError
from ..transport.line import Line
from ..transport.parcel import MAX_BLOB_BYTES, Assembler, Parcel, is_control, packed
from ..transport.stream import PROTOCOL
from ..wire.messages import Ack, Bye, Failure, Frame, Hello, Refused, Reply, Welcome
from ..wire.packets import control, read_control
from .turns import Turns
from .worker import Worker, WorkerSession

__all__ = ["Host", "Seat"]

HELLO_S = 10.0  # seconds that a stream may take to say hello
ENDED = 64  # sessions whose end is remembered
INBOX_FRAMES = 64  # frames that wait for their turn before the stream is left unread
_GONE = "no longer knows this session: it was restarted, or the session's lease ended, or it was never this one's"

log = logging.getLogger(__name__)


class _Refusal(Exception):
    """A stream that is not gone on with, and what its peer is told."""

    def __init__(self, code: Any, reason: str) -> None:
        super().__init__(reason)
        self.message = Refused(code, reason)


class Seat:
    """One session's place at the host: the door, the frames that wait, the replies that are not acknowledged."""

    def __init__(self, principal: str, door: WorkerSession, most_kept: int) -> None:
        self.token = secrets.token_hex(16)
        self.principal = principal
        self.door = door
        self.line = Line()
        self.inbox: deque[Frame] = deque()
        self.changed = threading.Condition()
        self.stream = 0  # number of the present stream, 0 while there is none
        self.streams = 0
        self.away_since: float | None = None
        self.end: Refused | None = None  # why the session is over
        self._most_kept = most_kept
        self._under_way: Iterator[None] | None = None

    def steps(self) -> Iterator[None] | None:
        """A `Job`: go on with the frame under way, or begin the next."""
        with self.changed:
            if self.end is not None:
                self._under_way = None
                return None
            if self._under_way is None and self.inbox:
                self._under_way = self._done(self.inbox[0])
            return self._under_way

    def _done(self, frame: Frame) -> Iterator[None]:
        reply = yield from self.door.work(frame)
        try:
            parcel = packed(reply)
        except Exception as error:  # a dtype that does not travel, no memory for a copy: nobody else's turns end by it
            parcel = packed(Reply(frame.number, (), (*reply.failures, Failure(0, 0, "fetch", str(error), writes=True))))
        with self.changed:
            self._under_way = None
            if self.end is None:  # else the inbox is empty, and nobody waits
                self.inbox.popleft()
                self.line.send(parcel)
                self.changed.notify_all()
            kept = self.line.kept_bytes
        if kept > self._most_kept:
            self.finish(Refused("limit", f"kept {kept:,} bytes of answers that nobody read, and keeps no more"))

    def wait_for(self, stream: int, number: int) -> tuple[Parcel | None, Refused | None, int]:
        """Wait for a reply, the end, or another stream; with the number of the last frame that came."""
        with self.changed:
            self.changed.wait_for(
                lambda: self.stream != stream or self.end is not None or self.line.parcel(number) is not None
            )
            return self.line.parcel(number), self.end, self.line.received

    def finish(self, why: Refused) -> None:
        """The session is over; its stream, if there is one, is told."""
        with self.changed:
            if self.end is None:
                self.end = why
                self.inbox.clear()
                self.door.close()  # before anybody hears of the end
                self.changed.notify_all()


class Host:
    """All sessions of a worker that come over streams.

    `lease_s`: for how long an absent client's session is kept. `frame_bytes`: the largest frame's tensors.
    `seats` and `seats_each`: how many sessions there may be, of all and of one principal.
    `admits(principal)` is asked when a stream begins and at each frame: a certificate may be revoked meanwhile."""

    def __init__(
        self,
        worker: Worker,
        *,
        threads: int = 0,
        lease_s: float = 300.0,
        frame_bytes: int = MAX_BLOB_BYTES,
        seats: int = 4096,
        seats_each: int = 512,
        admits: Callable[[Any], bool] = lambda principal: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.worker = worker
        self.lease_s = lease_s
        self.counters: Counter[str] = Counter()
        self.admits = admits
        self._frame_bytes, self._most_seats, self._most_each, self._clock = frame_bytes, seats, seats_each, clock
        self._seats: dict[str, Seat] = {}
        self._ended: OrderedDict[str, Seat] = OrderedDict()  # the last ones, so that their clients hear why
        self._lock = threading.Lock()
        self.turns = Turns(threads)
        self._draining = False
        self._closed = threading.Event()
        self._janitor = threading.Thread(target=self._expire_now_and_then, name="housecall-leases", daemon=True)
        self._janitor.start()

    @property
    def seats(self) -> tuple[Seat, ...]:
        """The sessions that are kept."""
        with self._lock:
            return tuple(self._seats.values())

    # -- one stream ---------------------------------------------------------------------------------------

    def serve(self, incoming: Iterator[bytes], principal: Any) -> Iterator[bytes]:
        """The worker's side of one stream from `principal` (anything whose `str` names it, the same for the same)."""
        reader = _Reader(self, incoming, principal)
        try:
            seat, hello = reader.welcomed(HELLO_S)
        except TimeoutError:
            return  # a slow network, perhaps: the client may come again
        except (_Refusal, ProtocolError) as error:
            message = error.message if isinstance(error, _Refusal) else Refused("protocol", str(error))
            log.warning("refused %s: %s", principal, message.reason)
            self.counters["refused"] += 1
            yield control(message)
            return
        try:
            yield control(
                Welcome(PROTOCOL, seat.token, seat.line.received, self.lease_s, self._frame_bytes, self.worker.id)
            )
            yield from self._outgoing(seat, reader.stream, hello.received + 1)
        finally:
            self.left(seat, reader.stream)

    def _outgoing(self, seat: Seat, stream: int, cursor: int) -> Iterator[bytes]:
        while True:
            parcel, end, received = seat.wait_for(stream, cursor)
            if seat.stream != stream:
                return
            if end is not None and (parcel is None or end.code != "draining"):  # what was done is still delivered
                if end.reason:
                    yield control(end)
                return
            assert parcel is not None
            cursor += 1
            self.counters["bytes_out"] += parcel.nbytes
            for packet in parcel.packets(received):
                if seat.stream != stream:
                    return
                yield packet

    def take(self, seat: Seat, assembler: Assembler[Frame], packet: bytes, principal: Any) -> None:
        """One packet that came for a seat; waits while the seat's inbox is full. On the stream's reading thread."""
        if is_control(packet):
            match read_control(packet):
                case Ack(received=received):
                    with seat.changed:
                        seat.line.acknowledge(received)
                case Bye():
                    self.end(seat, Refused("session", ""))
                case other:
                    raise ProtocolError(f"a {type(other).__name__} in the middle of a session")
            return
        arrived = assembler.feed(packet)
        if arrived is None:
            return
        if not self.admits(principal):
            raise _Refusal("identity", "no longer admits this identity: it was revoked or has expired")
        begun, frame = arrived
        self.counters["bytes_in"] += assembler.nbytes
        with seat.changed:
            seat.line.acknowledge(begun.acknowledged)
            fresh = seat.line.accept(begun.number)
            if fresh and seat.end is None:
                self.counters["frames"] += 1
                self.counters["messages"] += len(frame.messages)
                seat.inbox.append(frame)
        if fresh:
            self.turns.add(seat)
        with seat.changed:
            seat.changed.wait_for(lambda: len(seat.inbox) < INBOX_FRAMES or seat.end is not None)

    # -- seats --------------------------------------------------------------------------------------------

    def seat(self, hello: Hello, principal: Any) -> Seat:
        """The seat that a hello asks for. Raises `_Refusal`."""
        if hello.version != PROTOCOL:
            raise _Refusal(
                "version", f"speaks version {PROTOCOL} of the protocol, not {hello.version}: upgrade the older side"
            )
        if not hello.session and hello.received:
            raise ProtocolError(f"a new session, and {hello.received:,} replies of it are said to have come")
        if not self.admits(principal):
            raise _Refusal("identity", "does not admit this identity: it was revoked or has expired")
        with self._lock:
            seat = self._seats.get(hello.session) if hello.session else self._opened(principal)
            ended = self._ended.get(hello.session)
        if ended is not None and ended.principal == str(principal) and ended.end is not None:
            raise _Refusal(ended.end.code, ended.end.reason)  # its stream broke before it could be told
        if seat is None or seat.principal != str(principal) or seat.end is not None:
            raise _Refusal("session", _GONE)
        return seat

    def _opened(self, principal: Any) -> Seat:
        if self._draining:
            raise _Refusal("draining", "is shutting down and takes no new sessions")
        if len(self._seats) >= self._most_seats:
            raise _Refusal("limit", f"has {len(self._seats)} sessions and takes no more for now")
        if sum(seat.principal == str(principal) for seat in self._seats.values()) >= self._most_each:
            raise _Refusal("limit", f"holds {self._most_each} sessions of {principal} already: close some")
        name, role = getattr(principal, "name", str(principal)), getattr(principal, "role", "scientist")
        seat = Seat(str(principal), self.worker.open(name, role), self._frame_bytes)
        self._seats[seat.token] = seat
        self.counters["sessions"] += 1
        log.info("session opened by %s", principal)
        return seat

    def enter(self, seat: Seat, received: int) -> int:
        """A stream begins to serve a seat, in place of any other, to a client that has `received` so many replies;
        the stream's number."""
        with seat.changed:
            seat.line.resume(received)
            seat.streams += 1
            seat.stream = seat.streams
            seat.away_since = None
            if seat.streams > 1:
                self.counters["resumed"] += 1
            seat.changed.notify_all()
            return seat.stream

    def left(self, seat: Seat, stream: int) -> None:
        """A stream has ended. If it was the present one, the seat's lease runs."""
        with seat.changed:
            if seat.stream == stream:
                seat.stream = 0
                seat.away_since = self._clock()
                seat.changed.notify_all()

    def end(self, seat: Seat, why: Refused) -> None:
        """End a session: its slots are freed, whatever waits for its turn does not run."""
        with self._lock:
            known = self._seats.pop(seat.token, None) is not None
            if known and why.reason:
                self._ended[seat.token] = seat
                while len(self._ended) > ENDED:
                    self._ended.popitem(last=False)
        seat.finish(why)
        if known:
            log.info("session of %s ended%s", seat.principal, f": {why.reason}" if why.reason else "")

    def expire(self) -> None:
        """End the sessions whose clients have been away for longer than the lease."""
        now = self._clock()
        for seat in self.seats:
            if seat.end is not None:  # it ended itself
                self.end(seat, seat.end)
            elif seat.away_since is not None and now - seat.away_since > self.lease_s:
                self.counters["expired"] += 1
                self.end(seat, Refused("session", _GONE))

    def _expire_now_and_then(self) -> None:
        while not self._closed.wait(min(1.0, self.lease_s / 4)):
            self.expire()

    # -- the end ------------------------------------------------------------------------------------------

    def drain(self, timeout: float | None = None) -> bool:
        """Take no new sessions, do what has come, tell everybody; whether all was done within `timeout` seconds."""
        with self._lock:
            self._draining = True
        done = self.turns.wait_idle(timeout)
        self.close()
        return done

    def close(self) -> None:
        """End every session now."""
        self._closed.set()
        for seat in self.seats:
            self.end(seat, Refused("draining", "was shut down"))
        self.turns.close()


class _Reader:
    """Reads one stream on a thread of its own: gRPC's iterator waits, and cannot be told to stop."""

    def __init__(self, host: Host, incoming: Iterator[bytes], principal: Any) -> None:
        self._host, self._incoming, self._principal = host, incoming, principal
        self._ready = threading.Event()  # the hello has come, or never will
        self._refusal: Exception | None = None
        self._seat: Seat | None = None
        self._hello: Hello | None = None
        self.stream = 0
        threading.Thread(target=self._read, name="housecall-reader", daemon=True).start()

    def welcomed(self, timeout: float) -> tuple[Seat, Hello]:
        """The seat that this stream serves, once its hello has come."""
        if not self._ready.wait(timeout):
            raise TimeoutError
        if self._refusal is not None:
            raise self._refusal
        assert self._seat is not None
        assert self._hello is not None
        return self._seat, self._hello

    def _read(self) -> None:
        try:
            self._greet()
        except Exception as error:  # whatever it is, the stream gets an answer
            self._refusal = error if isinstance(error, _Refusal | ProtocolError) else _Refusal("protocol", "no hello")
            return
        finally:
            self._ready.set()
        assert self._seat is not None
        self._frames(self._seat)

    def _greet(self) -> None:
        hello = read_control(next(self._incoming))
        if not isinstance(hello, Hello):
            raise ProtocolError(f"a stream begins with a Hello, found a {type(hello).__name__}")
        self._seat, self._hello = self._host.seat(hello, self._principal), hello
        self.stream = self._host.enter(self._seat, hello.received)

    def _frames(self, seat: Seat) -> None:
        assembler = Assembler(Frame, self._host._frame_bytes)
        try:
            for packet in self._incoming:
                if seat.stream != self.stream:
                    return
                self._host.take(seat, assembler, packet, self._principal)
        except (_Refusal, ProtocolError) as error:
            if seat.stream == self.stream:
                message = error.message if isinstance(error, _Refusal) else Refused("protocol", str(error))
                log.warning("session of %s cut: %s", seat.principal, message.reason)
                self._host.end(seat, message)
        except Exception as error:  # the network's own: the client may come back
            log.debug("stream of %s broke: %s", seat.principal, error)
        finally:
            self._host.left(seat, self.stream)
