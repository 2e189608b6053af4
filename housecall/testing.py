"""What users need to test their own federations: faults that strike a stream, and a small world to run under them.

    faults = Faults.seeded(7, rate=0.05)                   # about each twentieth packet meets a fault
    worker = RemoteWorker(faulty(dial, faults), "clinic")  # whatever `dial` reaches

    with World(faults=Faults(Fault(Kind.BREAK_BEFORE, "out", at=3))) as world:
        x = torch.ones(3).send(world.worker)               # a real worker, in this process

What must live here: faults of streams, as a network or a worker's end brings them. What must not: the meaning of
a session; whether a fault is survived is for `transport.stream` and `host.host` to show.

NOTE [What TLS has taken care of]
TLS and HTTP/2 deliver packets whole, unchanged, once and in order, or break. So a packet that is truncated comes
with the end of its stream, and one that is corrupted is changed where the protocol sees it (its kind); a change
within the elements of a tensor is for TLS to notice, and is not repeated here. What comes twice is a whole frame or
reply, as after a resend; what comes out of order is what an old stream still delivers when its successor has begun.
"""

from __future__ import annotations

import random
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from enum import Enum
from types import TracebackType
from typing import Literal, NamedTuple

from .host.host import Host
from .remote import RemoteWorker
from .transport.parcel import Assembler, is_control
from .transport.stream import Dial, Link, LinkLost
from .wire.messages import Frame, Reply
from .worker.worker import Worker

__all__ = ["SURVIVED", "Clock", "Fault", "Faults", "Kind", "Way", "World", "faulty", "memory_dial"]

Way = Literal["out", "in", "dial"]


class Kind(Enum):
    """What may happen to a packet, to the stream that carries it, or to the attempt to open one."""

    DELAYED = "delayed packet"  # it comes late, and holds up what follows
    SLOW = "slow reader"  # from here on, every packet of this stream and direction comes late
    BREAK_BEFORE = "break before the packet"  # the stream breaks, and the packet with it
    BREAK_AFTER = "break after the packet"  # it arrives, then the stream breaks
    TRUNCATED = "truncated packet"  # half of it arrives, then the stream breaks
    CORRUPTED = "corrupted packet"  # it arrives changed; see NOTE [What TLS has taken care of]
    DUPLICATED = (
        "duplicated message"  # the frame or reply that it is of arrives twice; after a control packet, the next one
    )
    REORDERED = "reordered on reconnect"  # the stream breaks, and the packet arrives after the next stream began
    HALF_OPEN = "half-open stream"  # nothing arrives any more, either way, and nobody says so but the keep-alive
    REFUSED = "refused connection"  # the attempt to open a stream fails


# A session goes on after each of these as if nothing had been.
SURVIVED = (
    Kind.DELAYED,
    Kind.SLOW,
    Kind.BREAK_BEFORE,
    Kind.BREAK_AFTER,
    Kind.DUPLICATED,
    Kind.REORDERED,
    Kind.HALF_OPEN,
    Kind.REFUSED,
)


class Fault(NamedTuple):
    """A fault of the `at`-th packet that goes "out" (to the worker) or comes "in", or of the `at`-th "dial"."""

    kind: Kind
    way: Way
    at: int = 1


class Faults:
    """Which faults strike what: a plan over all streams of a session, and the account of what has struck.

    Packets and dials are counted from 1, over all streams, each way by itself; a stream's first packet out is its
    Hello, the first in its Welcome. `delay_s` is how late a delayed packet comes, `silence_s` after how long a
    keep-alive notices a half-open stream, `linger_s` for how long at most a stream waits for its successor."""

    def __init__(self, *faults: Fault, delay_s: float = 0.002, silence_s: float = 0.02, linger_s: float = 1.0) -> None:
        self.delay_s, self.silence_s, self.linger_s = delay_s, silence_s, linger_s
        self.struck: list[Fault] = []
        self.passed: Counter[Way] = Counter()
        self._plan = {(fault.way, fault.at): fault.kind for fault in faults}
        self._rate = 0.0
        self._kinds: tuple[Kind, ...] = ()
        self._dice: dict[Way, random.Random] = {}
        self._lock = threading.Lock()
        self._streams: weakref.WeakSet[_FaultyLink] = weakref.WeakSet()

    @classmethod
    def seeded(cls, seed: int, rate: float = 0.05, kinds: tuple[Kind, ...] = SURVIVED) -> Faults:
        """Each packet and each dial meets a fault with probability `rate`. What the n-th meets follows from `seed`
        alone, however threads take turns."""
        faults = cls()
        faults._rate, faults._kinds = rate, kinds
        for way in ("out", "in", "dial"):
            faults._dice[way] = random.Random(f"{seed} {way}")  # noqa: S311  # a plan to repeat, not a secret
        return faults

    def strike(self, *faults: Fault) -> None:
        """Add faults, counted from now: `at=1` is the next packet or dial."""
        with self._lock:
            self._plan.update({(fault.way, self.passed[fault.way] + fault.at): fault.kind for fault in faults})

    def stop(self) -> None:
        """No more faults: what passes from now on passes."""
        with self._lock:
            self._plan.clear()
            self._rate = 0.0

    def cut(self) -> None:
        """Break every stream that is under way, now."""
        for stream in tuple(self._streams):
            stream.broken("the connection was cut")

    def meets(self, way: Way) -> Kind | None:
        """What the next packet or dial meets, and count it."""
        with self._lock:
            self.passed[way] += 1
            kind = self._plan.pop((way, self.passed[way]), None) or self._diced(way)
            if kind is not None:
                self.struck.append(Fault(kind, way, self.passed[way]))
            return kind

    def _diced(self, way: Way) -> Kind | None:
        kinds = [kind for kind in self._kinds if (kind is Kind.REFUSED) == (way == "dial")]
        if not kinds or self._dice[way].random() >= self._rate:
            return None
        return self._dice[way].choice(kinds)


def faulty(dial: Dial, faults: Faults) -> Dial:
    """The same way to reach a worker, with faults."""
    latest: list[_FaultyLink] = []  # the last one, and those before it that it has not succeeded

    def open_stream(outgoing: Iterator[bytes]) -> Link:
        if faults.meets("dial") is Kind.REFUSED:
            return _Refusing()
        before = [link for link in latest if not link.succeeded.is_set()]
        latest[:] = [*before, _FaultyLink(dial, faults, outgoing, before)]
        return latest[-1]

    return open_stream


class _Refusing:
    """A connection that was refused."""

    def __next__(self) -> bytes:
        raise LinkLost("connection refused")

    def cancel(self) -> None:
        pass


class _Copies:
    """The packets of the frame or reply that is passing by, to pass them once more if that is asked for."""

    def __init__(self, whole: Assembler[Frame] | Assembler[Reply]) -> None:
        self._whole = whole
        self._packets: list[bytes] = []
        self.wanted = False

    def after(self, packet: bytes) -> list[bytes]:
        """What is to follow this packet."""
        if is_control(packet):
            return []
        self._packets.append(packet)
        if self._whole.feed(packet) is None:
            return []
        again, self._packets = self._packets if self.wanted else [], []
        self.wanted = False
        return again


class _FaultyLink:
    """One stream through its faults. What is sent passes on the thread that pulls it, what comes on one of our own,
    so that a stream which has broken, or is half open, keeps nobody waiting."""

    def __init__(self, dial: Dial, faults: Faults, outgoing: Iterator[bytes], before: list[_FaultyLink]) -> None:
        self._faults = faults
        self._before = before
        self._changed = threading.Condition()
        self._came: deque[bytes] = deque()
        self._end: str | None = None  # why nothing more will come; empty if the worker ended the stream
        self._over = threading.Event()
        self._slow: set[Way] = set()
        self._half_open = False
        self._held: list[bytes] = []
        self._lingers = False  # the worker is not to notice the end before the next stream has begun
        self.succeeded = threading.Event()
        self._copies = {"out": _Copies(Assembler(Frame)), "in": _Copies(Assembler(Reply))}
        self._link: Link | None = None
        faults._streams.add(self)
        link = self._link = dial(self._sent(outgoing))  # it may be pulling already
        if self._end is not None:
            self._give_up()
        threading.Thread(target=self._receive, args=(link,), name="housecall-faulty", daemon=True).start()

    def __next__(self) -> bytes:
        with self._changed:
            while not self._came and self._end is None:
                if self._half_open and not self._changed.wait(self._faults.silence_s):
                    self.broken("the keep-alive found nobody")
                elif not self._half_open:
                    self._changed.wait()
            if self._came:
                self._changed.notify_all()
                return self._came.popleft()
        if self._end:
            raise LinkLost(self._end)
        raise StopIteration

    def cancel(self) -> None:
        """Give the stream up."""
        with self._changed:
            self._came.clear()
        self.broken("the stream was given up")

    def broken(self, why: str) -> None:
        """Nothing passes any more; `why` is empty if the worker ended the stream."""
        with self._changed:
            if self._end is None:
                self._end = why
                self._over.set()
                self._changed.notify_all()
        self._give_up()

    def _give_up(self) -> None:
        if self._link is not None and not self._lingers:
            self._link.cancel()

    # -- what is sent -------------------------------------------------------------------------------------

    def _sent(self, outgoing: Iterator[bytes]) -> Iterator[bytes]:
        for packet in outgoing:
            if self._end is not None:
                break
            yield from self._through("out", packet)
            if self._end is not None:
                break
        if self._lingers:
            self.succeeded.wait(self._faults.linger_s)
            yield from self._held

    # -- what comes ---------------------------------------------------------------------------------------

    def _receive(self, link: Link) -> None:
        try:
            while self._end is None:
                packet = next(link)
                while self._before:
                    self._before.pop().succeeded.set()
                for passed in self._through("in", packet):
                    self._deliver(passed)
            self.succeeded.wait(self._faults.linger_s if self._lingers else 0)
        except StopIteration:
            self.broken("")
        except LinkLost as loss:
            self.broken(str(loss) or "the stream ended")
        finally:
            link.cancel()

    def _deliver(self, packet: bytes) -> None:
        with self._changed:
            self._changed.wait_for(lambda: len(self._came) < 2 or self._end is not None)  # what lies about is bounded
            if self._end is None:
                self._came.append(packet)
                self._changed.notify_all()

    # -- what happens to a packet -------------------------------------------------------------------------

    def _through(self, way: Way, packet: bytes) -> Iterator[bytes]:
        """What arrives in the place of a packet."""
        kind = self._faults.meets(way)
        copies = self._copies[way]
        copies.wanted |= kind is Kind.DUPLICATED
        if kind is Kind.SLOW:
            self._slow.add(way)
        if kind is Kind.HALF_OPEN:
            with self._changed:
                self._half_open = self._lingers = True
                self._changed.notify_all()
        if self._half_open:
            return
        if kind is Kind.DELAYED or way in self._slow:
            self._over.wait(self._faults.delay_s)
        match kind:
            case Kind.BREAK_BEFORE:
                self.broken("the connection was lost")
            case Kind.BREAK_AFTER:
                yield packet
                self.broken("the connection was lost")
            case Kind.TRUNCATED:
                yield packet[: len(packet) // 2]
                self.broken("the connection was lost within a packet")
            case Kind.CORRUPTED:
                copies.after(packet)
                yield bytes((packet[0] ^ 0x80,)) + packet[1:]
            case Kind.REORDERED:
                self._held, self._lingers = [packet] if way == "out" else [], True
                self.broken("the connection was lost")
            case _:
                yield packet
                yield from copies.after(packet)


# -- a small world ----------------------------------------------------------------------------------------


class _MemoryLink:
    """A stream within this process. What is sent is pulled on a thread of its own, as a network does, so that the
    worker hears of the end although the client says nothing."""

    def __init__(self, serve: Callable[[Iterator[bytes]], Iterator[bytes]], outgoing: Iterator[bytes]) -> None:
        self._changed = threading.Condition()
        self._sent: deque[bytes] = deque()
        self._ended = False
        self._packets = serve(self._arriving())
        threading.Thread(target=self._pull, args=(outgoing,), name="housecall-memory", daemon=True).start()

    def __next__(self) -> bytes:
        return next(self._packets)

    def cancel(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _pull(self, outgoing: Iterator[bytes]) -> None:
        for packet in outgoing:
            with self._changed:
                self._changed.wait_for(lambda: len(self._sent) < 2 or self._ended)
                if self._ended:
                    return
                self._sent.append(packet)
                self._changed.notify_all()
        self.cancel()

    def _arriving(self) -> Iterator[bytes]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._sent or self._ended)
                if not self._sent:
                    return
                packet = self._sent.popleft()
                self._changed.notify_all()
            yield packet


def memory_dial(host: Callable[[], Host], principal: str = "me") -> Dial:
    """Streams to the host that `host()` gives at the time, in this process, as `principal`."""
    return lambda outgoing: _MemoryLink(lambda packets: host().serve(packets, principal), outgoing)


class Clock:
    """Time that passes only when it is told to, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """The time now."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


class World:
    """A worker, its host and a session at it, all in this process, over a stream that meets `faults`.

    Everything is real but the network and the host's clock. `worker` is the session to send tensors to; `connect`
    gives more, of other principals if need be. `with` closes all."""

    def __init__(
        self, id: str = "clinic", *, faults: Faults | None = None, patience: float = 10.0, lease_s: float = 60.0
    ) -> None:
        self.id = id
        self.clock = Clock()
        self.faults = faults if faults is not None else Faults()
        self._patience, self._lease_s = patience, lease_s
        self._first: deque[Callable[[], None]] = deque()
        self._sessions: list[RemoteWorker] = []
        self.host = self._fresh()
        self.worker = self.connect()

    def connect(self, principal: str = "me", faults: Faults | None = None) -> RemoteWorker:
        """Another session at the worker, over streams of its own."""
        given = faults if faults is not None else self.faults
        dial = faulty(memory_dial(self._present, principal), given)
        session = RemoteWorker(dial, f"memory://{self.id}", patience=self._patience)
        self._sessions.append(session)
        return session

    @property
    def slots(self) -> int:
        """How many values the worker holds, for all sessions together."""
        return sum(len(seat.door.store) for seat in self.host.seats)

    def before_next_dial(self, action: Callable[[], None]) -> None:
        """Let something happen while the client is away: after a stream broke, before the next is opened."""
        self._first.append(action)

    def restart(self) -> None:
        """The worker's process is killed and started again: every session, every value is gone."""
        self.faults.cut()
        old, self.host = self.host, self._fresh()
        old.close()

    def lapse(self) -> None:
        """Time passes until the leases of all who are away have ended."""
        self.faults.cut()
        for seat in self.host.seats:
            with seat.changed:
                seat.changed.wait_for(lambda seat=seat: seat.stream == 0, self.faults.linger_s)  # type: ignore[misc]  # a lambda's default
        self.clock.advance(self._lease_s + 1)
        self.host.tidy()

    def close(self) -> None:
        """Close the sessions, without faults, and the host."""
        self.faults.stop()
        for session in self._sessions:
            session.close()
        self.host.close()

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fresh(self) -> Host:
        return Host(Worker(self.id), lease_s=self._lease_s, clock=self.clock)

    def _present(self) -> Host:
        while self._first:
            self._first.popleft()()
        return self.host
