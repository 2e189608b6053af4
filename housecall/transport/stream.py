"""The client's side of a session over streams that may break: a `Transport` that reconnects and resumes.

A stream is a function: given the packets to send, it gives the packets that come (`Dial`). gRPC is one such
function, a worker in this process another, and a faulty one wraps either. Nothing here knows a network.

NOTE [Who reads, who writes]
The stream itself pulls what is to be sent, on a thread of its own, from `_outgoing`; the caller's thread reads,
and only while it waits. So a session costs no thread of ours, and results that nobody waits for stay with the
worker. If more than `WINDOW_FRAMES` or `WINDOW_BYTES` are under way, `send` reads until there are fewer.

NOTE [Breaks]
After a break the caller's thread dials again, with back-off, for `patience` seconds; then the session is lost, and
everything done with it says so. Each stream has a number; what an old one still does is ignored.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

from ..errors import ProtocolError, WorkerGone
from ..wire.messages import Ack, Bye, Frame, Hello, Refused, Reply, Welcome
from ..wire.packets import control, read_control
from .line import Line
from .parcel import Assembler, is_control, packed
from .whole import whole

__all__ = ["PROTOCOL", "Dial", "Link", "LinkLost", "StreamTransport"]

PROTOCOL = 1  # the version of all that crosses: messages, packets, their meaning
WINDOW_FRAMES = 256
WINDOW_BYTES = 1 << 29
ACK_BYTES = 1 << 20  # what the worker keeps for us beyond this is acknowledged at once
_FIRST_DELAY, _LONGEST_DELAY = 0.02, 1.0  # seconds between attempts to reconnect

log = logging.getLogger(__name__)


class LinkLost(Exception):  # an event that the session survives, not yet an error
    """A stream has broken: nothing more will come from it."""


class Link(Protocol):
    """One stream, as long as it lasts: the packets that come."""

    def __next__(self) -> bytes:
        """The next packet; waits for it. Raises `LinkLost` or `StopIteration` when there will be none."""

    def cancel(self) -> None:
        """Give the stream up. Harmless when it has ended."""


Dial = Callable[[Iterator[bytes]], Link]


class StreamTransport:
    """A `Transport` to a worker that is reached by `dial`.

    `patience` is for how many seconds a lost worker is tried again; `clock` and `sleep` are time's. Raises
    `WorkerGone` if the worker cannot be reached or refuses."""

    remote = True
    frame_messages = 64  # a frame leaves early, so that the worker computes while the caller still issues

    def __init__(
        self,
        dial: Dial,
        *,
        name: str,
        client: str = "",
        patience: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name = name
        self.worker = ""
        self.reconnections = 0
        self.frame_bytes = 0  # the worker says
        self._dial, self._client, self._patience, self._clock, self._sleep = dial, client, patience, clock, sleep
        self._changed = threading.Condition()
        self._line = Line()
        self._token = ""
        self._stream = 0  # number of the present stream
        self._cursor = 0  # the next frame that the present stream is to carry; 0 until the worker's welcome
        self._ack_due = False
        self._owed = 0
        self._replies: deque[Reply] = deque()
        self._link: Link | None = None
        self._assembler = Assembler(Reply)
        self._lost: str | None = None
        self._trouble_since: float | None = None  # until a stream brings more than its welcome
        self._delay, self._welcomed_at = 0.0, clock()
        self._resume("")

    # -- Transport ----------------------------------------------------------------------------------------

    def send(self, frame: Frame) -> None:
        """Queue a frame; its stream takes it at once. Waits only for room in the window."""
        self._check_open()
        parcel = packed(frame)
        with self._changed:
            self._line.send(parcel)
            self._owed += 1
            self._changed.notify_all()
        while self._line.sent - self._line.received > WINDOW_FRAMES or self._line.kept_bytes > WINDOW_BYTES:
            self._read()

    def start(self) -> None:
        """Nothing to do: what was sent runs at the worker."""

    def wait(self) -> None:
        """Read until there is a reply."""
        if not self._owed:
            raise WorkerGone(f"worker '{self.name}' owes no reply")
        while not self._replies:
            self._check_open()
            self._read()

    def receive(self) -> Reply:
        """The next reply."""
        self.wait()
        self._owed -= 1
        return self._replies.popleft()

    def close(self) -> None:
        """End the session: the worker frees it now, if it can be told, else when its lease ends."""
        with self._changed:
            if self._lost is not None:
                return
            self._lost = "is closed; its values are gone. Connect anew"
            self._changed.notify_all()
        if self._link is None or not self._ended(self._link):  # the stream had broken: tell the worker over another
            with contextlib.suppress(LinkLost, StopIteration, ProtocolError, WorkerGone):
                self._ended(self._connect())
        self._give_up_link()

    # -- reading ------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Take one packet from the stream; resume if it has broken."""
        link = self._link
        if link is None:
            self._resume("")
            return
        try:
            packet = next(link)
            with whole():  # what has come is taken as a whole
                self._take(packet)
        except (LinkLost, StopIteration) as loss:
            self._resume(str(loss) or "the stream ended")
        except ProtocolError as error:
            self._lose(f"broke the protocol: {error}")
            self._check_open()
        except BaseException:  # Ctrl-C in the middle of a read: the stream cannot go on, the session can
            self._give_up_link()
            raise

    def _take(self, packet: bytes) -> None:
        if is_control(packet):
            self._told(read_control(packet))
            return
        arrived = self._assembler.feed(packet)
        if arrived is None:
            return
        self._trouble_since = None
        begun, reply = arrived
        with self._changed:
            self._acknowledged(max(begun.acknowledged, begun.number))  # a reply says that its frame came
            if self._line.accept(begun.number):
                self._replies.append(reply)
            if self._assembler.nbytes > ACK_BYTES:
                self._ack_due = True
                self._changed.notify_all()

    def _acknowledged(self, number: int) -> None:
        """The worker has the frames up to this one. It may have had the last of them by the stream before, after it
        welcomed this one: then they are not sent again."""
        self._line.acknowledge(number)
        if self._cursor:
            self._cursor = max(self._cursor, number + 1)
            self._changed.notify_all()

    def _told(self, message: object) -> None:
        match message:
            case Ack(received=received):
                with self._changed:
                    self._acknowledged(received)
            case Refused(reason=reason):
                self._lose(reason)
            case _:
                raise ProtocolError(f"a {type(message).__name__} from worker '{self.name}' where none is due")

    # -- writing: on the stream's own thread --------------------------------------------------------------

    def _outgoing(self, stream: int, hello: Hello) -> Iterator[bytes]:
        yield control(hello)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stream != stream or self._lost is not None or self._due())
                if self._stream != stream:
                    return
                parcel = self._line.parcel(self._cursor) if self._cursor else None
                ended = self._lost is not None
                received, self._ack_due = self._line.received, False
                self._cursor += parcel is not None
            if ended:
                yield control(Bye())
                return
            if parcel is None:
                yield control(Ack(received))
                continue
            for packet in parcel.packets(received):
                if self._stream != stream:
                    return
                yield packet

    def _due(self) -> bool:
        return bool(self._cursor) and (self._ack_due or self._line.parcel(self._cursor) is not None)

    # -- connecting ---------------------------------------------------------------------------------------

    def _resume(self, why: str) -> None:
        """Dial until the worker welcomes us, or patience ends."""
        if why:
            log.warning("lost the connection to worker '%s' (%s); reconnecting", self.name, why)
        now = self._clock()
        if self._trouble_since is None or now - self._welcomed_at > self._patience:
            self._trouble_since, self._delay = now, 0.0  # else the last stream brought nothing but its welcome
        while True:
            self._give_up_link()
            if self._delay:
                self._sleep(self._delay)
            self._delay = min(max(2 * self._delay, _FIRST_DELAY), _LONGEST_DELAY)
            try:
                self._connect()
                return
            except (LinkLost, StopIteration) as loss:
                why = str(loss) or "the stream ended"
            except ProtocolError as error:
                self._lose(f"broke the protocol: {error}")
                self._check_open()
            except BaseException:
                self._give_up_link()
                raise
            if self._clock() - self._trouble_since >= self._patience:
                self._lose(f"cannot be reached ({why}; tried for {self._patience:g} s)")
                self._check_open()

    def _connect(self) -> Link:
        with self._changed:
            self._stream += 1
            hello = Hello(PROTOCOL, self._token, self._line.received, self._client)
        self._assembler = Assembler(Reply)
        link = self._link = self._dial(self._outgoing(self._stream, hello))
        packet = self._first(link)
        match read_control(packet):
            case Welcome() as welcome:
                self._welcomed(welcome)
                self._welcomed_at = self._clock()
                return link
            case Refused(reason=reason):
                self._lose(reason)
                raise self._error()
            case other:
                raise ProtocolError(f"a {type(other).__name__} where a Welcome is due")

    def _first(self, link: Link) -> bytes:
        """The first packet of a stream, within `patience`: one may accept, and never answer."""
        seconds, late = max(self._patience, 1.0), threading.Event()

        def give_up() -> None:
            late.set()
            link.cancel()

        watchdog = threading.Timer(seconds, give_up)
        watchdog.daemon = True
        watchdog.start()
        try:
            return next(link)
        except (LinkLost, StopIteration):
            if late.is_set():
                raise LinkLost(f"what answers there said nothing for {seconds:g} s") from None
            raise
        finally:
            watchdog.cancel()

    def _welcomed(self, welcome: Welcome) -> None:
        with self._changed:
            if self._token:
                self.reconnections += 1
                log.info("resumed the session at worker '%s'", self.name)
            self._token, self.worker, self.frame_bytes = welcome.session, welcome.worker, welcome.frame_bytes
            self._line.resume(welcome.received)
            self._cursor = welcome.received + 1
            self._changed.notify_all()

    def _give_up_link(self) -> None:
        with self._changed:
            self._stream += 1  # whatever the old stream still pulls, it gets nothing more
            self._cursor = 0
            self._changed.notify_all()
        link, self._link = self._link, None
        if link is not None:
            link.cancel()

    def _ended(self, link: Link) -> bool:
        """Read until the worker has seen our Bye and ended the stream; whether it has."""
        try:
            while True:
                next(link)
        except StopIteration:
            return True
        except LinkLost:
            return False

    def _lose(self, why: str) -> None:
        next_step = (
            "The values it held for this session are lost; connect again" if self._token else "Is it up, and there?"
        )
        self._lost = self._lost or f"{why}. {next_step}"
        self._give_up_link()

    def _check_open(self) -> None:
        if self._lost is not None:
            raise self._error()

    def _error(self) -> WorkerGone:
        return WorkerGone(f"worker '{self.name}' {self._lost}")
