"""The worker behind a wire: its sessions, their leases, their breaks and resumptions, the end of it all.

`serve` is the worker's side of one stream: packets in, packets out, whichever network carries them. What a stream
brings goes to its session's *seat* (`seat`), the seat takes its turn, and its replies stay until they are acknowledged.
What has not had its turn takes room that all sessions share (`room`); a stream for which there is none is left unread.

Everything that arrives is read as an attacker's: a peer that breaks the protocol loses its session, nobody else
notices. Only the principal that opened a session can resume it, and a wrong token is answered like one that has
expired.

NOTE [Certificates that end, and those that are revoked]
Who is revoked loses the session, whatever it is at: `standing` is asked when a stream begins, at each frame, before
each step of one and each packet of an answer, and once a second of those who are idle. A certificate that ends is no
crime: its stream ends, and the client may resume with the one that it was given since.

NOTE [The last word]
A stream that is reset can lose what was sent on it last. So after `Refused` a stream stays for up to `LINGER_S`
seconds, and what still comes is passed over, until the client has hung up; and for those who did not hear it the
reasons of the last `ENDED` ends are kept.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import ProtocolError
from ..transport.parcel import MAX_BLOB_BYTES, Assembler, is_control
from ..transport.stream import PROTOCOL
from ..wire.messages import Ack, Bye, Frame, Hello, Refused, Welcome
from ..wire.packets import control, read_control
from ..worker.worker import Worker
from .room import Claim, Room
from .seat import Came, Seat, Standing, about, good, revoked
from .turns import Turns

__all__ = ["Host", "Seat"]

HELLO_S = 10.0  # seconds that a stream may take to say hello
LINGER_S = 1.0  # seconds that a client has to read why it is refused
ENDED = 4096  # sessions whose end is remembered, by token and reason
INBOX_FRAMES = 64  # frames that wait for their turn before the stream is left unread
INBOX_BYTES = 8_000_000_000  # of tensors in all frames that wait, or are on their way; and what their heads may become
HEAD_BYTES = 1 << 30
CLOSE_S = 5.0  # seconds that the operation under way has, when the worker is closed
_LATE = "waited too long for the rest of a frame while others waited for its room: send less at a time"
_GONE = "no longer knows this session: it was restarted, or the session's lease ended, or it was never this one's"

log = logging.getLogger(__name__)


class _Refusal(Exception):
    """A stream that is not gone on with, and what its peer is told."""

    def __init__(self, code: Any, reason: str) -> None:
        super().__init__(reason)
        self.message = Refused(code, reason)

    @classmethod
    def of(cls, message: Refused) -> _Refusal:
        """One that says what was said before."""
        return cls(message.code, message.reason)


class _Over(Exception):  # an event, not an error
    """A stream that serves its session no more."""


class Host:
    """All sessions of a worker that come over streams.

    `lease_s`: for how long an absent client's session is kept. `frame_bytes`: the largest frame's tensors.
    `inbox_bytes`: those of all frames together that are on their way or wait for their turn. `seats` and `seats_each`:
    how many sessions there may be, of all and of one principal. `standing(principal)` says whether its certificate is
    still good: it may be revoked at any time."""

    def __init__(
        self,
        worker: Worker,
        *,
        threads: int = 0,
        lease_s: float = 300.0,
        frame_bytes: int = MAX_BLOB_BYTES,
        inbox_bytes: int = INBOX_BYTES,
        seats: int = 4096,
        seats_each: int = 64,
        standing: Callable[[Any], Standing] = good,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.worker = worker
        self.lease_s = lease_s
        self.counters: Counter[str] = Counter()
        self.standing = standing
        self.heads, self.blobs = Room(HEAD_BYTES, HEAD_BYTES // 4), Room(inbox_bytes, inbox_bytes // 4)
        self._frame_bytes, self._most_seats, self._most_each, self._clock = frame_bytes, seats, seats_each, clock
        self._seats: dict[str, Seat] = {}
        self._ended: OrderedDict[str, tuple[str, Refused]] = OrderedDict()  # token -> whose it was, and why it ended
        self._lock = threading.Lock()
        self.turns = Turns(threads)
        self._draining = False
        self._closed = threading.Event()
        self._janitor = threading.Thread(target=self._tidy_now_and_then, name="housecall-leases", daemon=True)
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
            message = _told(error)
            log.warning("refused %s: %s", principal, message.reason, extra=self._about("refused", principal=principal))
            self.counters["refused"] += 1
            yield control(message)
            reader.over.wait(LINGER_S)
            return
        try:
            yield control(
                Welcome(PROTOCOL, seat.token, seat.line.received, self.lease_s, self._frame_bytes, self.worker.id)
            )
            yield from self._outgoing(seat, reader, hello.received + 1)
        finally:
            self.left(seat, reader.stream)

    def _outgoing(self, seat: Seat, reader: _Reader, cursor: int) -> Iterator[bytes]:
        stream = reader.stream
        while True:
            parcel, end, received = seat.wait_for(stream, cursor)
            if seat.stream != stream:
                return
            if end is not None and (parcel is None or end.code != "draining"):  # what was done is still delivered
                if end.reason:
                    yield control(end)
                    reader.over.wait(LINGER_S)
                return
            assert parcel is not None
            cursor += 1
            self.counters["bytes_out"] += parcel.nbytes
            for packet in parcel.packets(received):
                if seat.stream != stream:
                    return
                if self.standing(seat.who) == "revoked":
                    self.end(seat, revoked())
                    break
                yield packet

    def take(self, seat: Seat, arrival: _Arrival, packet: bytes, principal: Any) -> None:
        """One packet that came for a seat; waits while there is no room for what it brings. On the stream's reading
        thread. Raises `_Over` if the stream ends meanwhile."""
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
        arrived = arrival.assembler.feed(packet)
        if arrived is None:
            return
        match self.standing(principal):
            case "revoked":
                raise _Refusal.of(revoked())
            case "ended":
                raise _Over
        if self._draining:  # what came before is done; this waits for the end, and is not
            with seat.changed:
                seat.changed.wait_for(lambda: not arrival.goes_on())
            raise _Over
        begun, frame = arrived
        self.counters["bytes_in"] += arrival.assembler.nbytes
        with seat.changed:
            seat.line.acknowledge(begun.acknowledged)
            fresh = seat.line.accept(begun.number) and seat.end is None
            claim = arrival.whole()  # what has raised before this leaves it to `forget`
            if fresh:
                self.counters["frames"] += 1
                self.counters["messages"] += len(frame.messages)
                seat.inbox.append(Came(frame, claim))
            else:
                claim.release()
        if fresh:
            self.turns.add(seat)
        with seat.changed:
            seat.changed.wait_for(lambda: len(seat.inbox) < INBOX_FRAMES or not arrival.goes_on())

    # -- seats --------------------------------------------------------------------------------------------

    def seat(self, hello: Hello, principal: Any) -> Seat:
        """The seat that a hello asks for. Raises `_Refusal`."""
        if hello.version != PROTOCOL:
            raise _Refusal(
                "version", f"speaks version {PROTOCOL} of the protocol, not {hello.version}: upgrade the older side"
            )
        if not hello.session and hello.received:
            raise ProtocolError(f"a new session, and {hello.received:,} replies of it are said to have come")
        match self.standing(principal):
            case "revoked":
                raise _Refusal("identity", "does not admit this identity: its certificate was revoked")
            case "ended":
                raise _Refusal("identity", "does not admit this identity: its certificate has ended")
        with self._lock:
            if not hello.session:
                return self._opened(principal)
            seat = self._seats.get(hello.session)
            whose, why = self._ended.get(hello.session, ("", None))
        if seat is not None:
            whose, why = seat.principal, seat.end
        if whose == str(principal) and why is not None and why.reason:
            raise _Refusal.of(why)  # its stream broke before it could be told
        if seat is None or whose != str(principal) or why is not None:
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
        door = self.worker.open(name, role)
        seat = Seat(principal, door, self._frame_bytes, standing=lambda who: self.standing(who), count=self._count)
        self._seats[seat.token] = seat
        self.counters["sessions"] += 1
        log.info("session opened by %s", principal, extra=self._about("opened", seat))
        return seat

    def enter(self, seat: Seat, received: int, principal: Any) -> int:
        """A stream begins to serve a seat, in place of any other, to a client that has `received` so many replies;
        the stream's number."""
        with seat.changed:
            seat.line.resume(received)
            seat.streams += 1
            seat.stream = seat.streams
            seat.who = principal
            seat.away_since = None
            if seat.streams > 1:
                self.counters["resumed"] += 1
            seat.changed.notify_all()
            number = seat.stream
        self._look_again()
        return number

    def left(self, seat: Seat, stream: int) -> None:
        """A stream has ended. If it was the present one, the seat's lease runs."""
        with seat.changed:
            if seat.stream == stream:
                seat.stream = 0
                seat.away_since = self._clock()
                seat.changed.notify_all()
        self._look_again()

    def end(self, seat: Seat, why: Refused) -> None:
        """End a session: its slots are freed, whatever waits for its turn does not run."""
        with self._lock:
            known = self._seats.pop(seat.token, None) is not None
            if known and why.reason:
                self._ended[seat.token] = seat.principal, why
                while len(self._ended) > ENDED:
                    self._ended.popitem(last=False)
        if known:  # said before its client hears of it
            reason = f": {why.reason}" if why.reason else ""
            log.info("session of %s ended%s", seat.principal, reason, extra=self._about("ended", seat))
        seat.finish(why)
        self._look_again()

    def tidy(self) -> None:
        """End the sessions whose clients have been away for longer than the lease, whose principals are revoked, or
        that hold room from others; and the streams whose certificates have ended."""
        now = self._clock()
        held_up = self.heads.wanted or self.blobs.wanted
        for seat in self.seats:
            if seat.end is not None:  # it ended itself
                self.end(seat, seat.end)
            elif seat.away_since is not None and now - seat.away_since > self.lease_s:
                self.counters["expired"] += 1
                self.end(seat, Refused("session", _GONE))
            elif (standing := self.standing(seat.who)) == "revoked":
                self.end(seat, revoked())
            elif standing == "ended" and seat.stream:
                self.left(seat, seat.stream)
            elif held_up and (claim := seat.arriving) is not None and claim.is_late():
                self.counters["late"] += 1
                self.end(
                    seat,
                    Refused(
                        "limit",
                        _LATE,
                    ),
                )

    def _tidy_now_and_then(self) -> None:
        while not self._closed.wait(min(1.0, self.lease_s / 4)):
            try:
                self.tidy()
            except Exception:  # leases go on, whatever one session's end came to
                log.exception("leases could not be looked after", extra=self._about("error"))

    def _look_again(self) -> None:
        self.heads.look_again()
        self.blobs.look_again()

    def _count(self, name: str, number: int) -> None:
        self.counters[name] += number

    def _about(self, event: str, seat: Seat | None = None, principal: Any = "") -> dict[str, str]:
        return about(event, self.worker.id, seat, principal)

    # -- the end ------------------------------------------------------------------------------------------

    def drain(self, timeout: float | None = None) -> bool:
        """Take no new sessions and frames, do what has come, tell everybody; whether all was done within `timeout`
        seconds."""
        with self._lock:
            self._draining = True
        done = self.turns.wait_idle(timeout)
        if not done:
            for seat in self.seats:
                if waiting := len(seat.inbox):
                    log.warning(
                        "cut: %d frames of %s were not done within %g s",
                        waiting, seat.principal, timeout, extra=self._about("cut", seat),
                    )  # fmt: skip
        self.close()
        return done

    def close(self) -> bool:
        """End every session now; whether the operation under way, which cannot be stopped, has ended as well."""
        self._closed.set()
        for seat in self.seats:
            self.end(seat, Refused("draining", "was shut down"))
        return self.turns.close(CLOSE_S)


def _told(error: _Refusal | ProtocolError) -> Refused:
    return error.message if isinstance(error, _Refusal) else Refused("protocol", str(error))


class _Arrival:
    """What comes over one stream for a seat: frames are put together, each in room of its own."""

    def __init__(self, host: Host, seat: Seat, stream: int) -> None:
        self._host, self._seat, self._stream = host, seat, stream
        self._claim: Claim | None = None
        self.assembler = Assembler(Frame, host._frame_bytes, head_room=self._head_room, blob_room=self._blob_room)

    def goes_on(self) -> bool:
        """Whether this stream still serves its session."""
        return self._seat.stream == self._stream and self._seat.end is None

    def _head_room(self, nbytes: int) -> None:
        host, seat = self._host, self._seat
        self._claim = Claim(host.heads, host.blobs, seat.token, seat.principal, self.goes_on, host._clock)
        with seat.changed:
            if not self.goes_on():
                raise _Over
            seat.arriving = self._claim
        if not self._claim.head(nbytes):
            raise _Over

    def _blob_room(self, nbytes: int) -> None:
        assert self._claim is not None
        if not self._claim.blobs(nbytes):
            raise _Over

    def whole(self) -> Claim:
        """The frame is whole: what it has taken goes with it."""
        claim, self._claim = self._claim, None
        assert claim is not None
        if self._seat.arriving is claim:
            self._seat.arriving = None
        return claim

    def forget(self) -> None:
        """Nothing more comes: what a frame that came in part has taken is free again."""
        if self._claim is not None:
            with self._seat.changed:
                claim = self.whole()
            claim.release()


class _Reader:
    """Reads one stream on a thread of its own: gRPC's iterator waits, and cannot be told to stop. `over` is set when
    nothing more can come."""

    def __init__(self, host: Host, incoming: Iterator[bytes], principal: Any) -> None:
        self._host, self._incoming, self._principal = host, incoming, principal
        self._ready = threading.Event()  # the hello has come, or never will
        self.over = threading.Event()
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
            self._ready.set()
            assert self._seat is not None
            self._frames(self._seat)
            self._pass_over()
        except Exception as error:  # whatever it is, the stream gets an answer
            self._refusal = error if isinstance(error, _Refusal | ProtocolError) else _Refusal("protocol", "no hello")
            self._ready.set()
            self._pass_over()
        finally:
            self.over.set()

    def _pass_over(self) -> None:
        """Read what still comes, so that nothing stands in the way of the last word; the stream's end ends it."""
        try:
            for _ in self._incoming:
                pass
        except Exception as error:  # the network's own
            log.debug("stream of %s broke: %s", self._principal, error)

    def _greet(self) -> None:
        hello = read_control(next(self._incoming))
        if not isinstance(hello, Hello):
            raise ProtocolError(f"a stream begins with a Hello, found a {type(hello).__name__}")
        self._seat, self._hello = self._host.seat(hello, self._principal), hello
        self.stream = self._host.enter(self._seat, hello.received, self._principal)

    def _frames(self, seat: Seat) -> None:
        host = self._host
        arrival = _Arrival(host, seat, self.stream)
        try:
            for packet in self._incoming:
                if not arrival.goes_on():
                    return
                host.take(seat, arrival, packet, self._principal)
        except _Over:
            return
        except (_Refusal, ProtocolError) as error:
            if seat.stream == self.stream:
                message = _told(error)
                log.warning("session of %s cut: %s", seat.principal, message.reason, extra=host._about("cut", seat))
                host.end(seat, message)
        except Exception as error:  # the network's own: the client may come back
            log.debug("stream of %s broke: %s", seat.principal, error)
        finally:
            arrival.forget()
            if seat.end is None:
                host.left(seat, self.stream)
