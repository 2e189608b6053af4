"""A seat: one session's place at a host. The door, the frames that wait, the replies that are not acknowledged.

It outlives the streams that reach it, until its client says goodbye, its lease ends, or the worker does.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from ..transport.line import Line
from ..transport.parcel import Parcel, packed_reply
from ..wire.messages import Failure, Frame, Refused, Reply, Value
from ..worker.worker import WorkerSession
from .room import Claim

__all__ = ["Came", "Seat", "Standing", "about", "good", "revoked"]

Standing = Literal["good", "ended", "revoked"]

_REFUSALS = ("LimitError", "PolicyError", "UnknownOperator", "ProgramError", "LedgerError")

log = logging.getLogger(__name__)


class Came(NamedTuple):
    """A frame that is whole, and the room that it has taken."""

    frame: Frame
    claim: Claim


class Seat:
    """One session's place at the host. `who` is its principal, as the present stream showed it, or the last one.

    `standing` is asked before each step of a frame: whoever was revoked gets no further. `count` is told of what was
    refused. `most_kept`: bytes of answers that nobody has read."""

    def __init__(
        self,
        who: Any,
        door: WorkerSession,
        most_kept: int,
        *,
        standing: Callable[[Any], Standing],
        count: Callable[[str, int], None],
    ) -> None:
        self.token = secrets.token_hex(16)
        self.id = secrets.token_hex(4)  # for the log: whoever reads that cannot resume the session
        self.who = who
        self.principal = str(who)
        self.door = door
        self.line = Line()
        self.inbox: deque[Came] = deque()
        self.changed = threading.Condition()
        self.stream = 0  # number of the present stream, 0 while there is none
        self.streams = 0
        self.arriving: Claim | None = None  # what the frame that is on its way has taken
        self.away_since: float | None = None
        self.end: Refused | None = None  # why the session is over
        self._most_kept, self._standing, self._count = most_kept, standing, count
        self._under_way: Iterator[None] | None = None

    def steps(self) -> Iterator[None] | None:
        """A `Job`: go on with the frame under way, or begin the next."""
        with self.changed:
            if self.end is None and (self._under_way or self.inbox) and self._standing(self.who) == "revoked":
                self.finish(revoked())
            if self.end is not None:
                self._under_way = None
                return None
            if self._under_way is None and self.inbox:
                self._under_way = self._done(self.inbox[0].frame)
            return self._under_way

    def failed(self, error: Exception) -> None:
        """A `Job`: a step raised what no step should. Nobody else's session ends by it."""
        log.error("session of %s ends: an error of the worker's own", self.principal, exc_info=error)
        self.finish(Refused("session", "had an error of its own while it did what came; its log says which"))

    def _done(self, frame: Frame) -> Iterator[None]:
        reply = yield from self.door.work(frame)
        parcel = packed_reply(reply)
        self._count_refusals(reply)
        with self.changed:
            self._under_way = None
            if self.end is None:  # else the inbox is empty, and nobody waits
                came = self.inbox.popleft()
                self.line.send(parcel)
                self.changed.notify_all()
                came.claim.release()
            kept = self.line.kept_bytes
        if kept > self._most_kept:
            self.finish(Refused("limit", f"kept {kept:,} bytes of answers that nobody read, and keeps no more"))

    def _count_refusals(self, reply: Reply) -> None:
        told = list(reply.failures)
        for result in reply.results:
            if isinstance(result, Value):
                told += [item for item in result.arrays if isinstance(item, Failure)]
        if told:
            refused = sum(one.operator == "release" or one.reason.startswith(_REFUSALS) for one in told)
            self._count("failed_calls", len(told))
            self._count("refused_calls", refused)

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
                for came in self.inbox:
                    came.claim.release()
                self.inbox.clear()
                self.door.close()  # before anybody hears of the end
                self.changed.notify_all()


def good(who: Any) -> Standing:
    """The standing of those who need no certificate."""
    return "good"


def revoked() -> Refused:
    """The end of a session whose principal's certificate was revoked."""
    return Refused("identity", "no longer admits this identity: its certificate was revoked")


def about(event: str, worker: str, seat: Seat | None = None, principal: Any = "") -> dict[str, str]:
    """Fields of a record of the log, for whoever collects them: what happened, where, of whom."""
    who, session = (str(principal), "") if seat is None else (seat.principal, seat.id)
    return {"event": event, "worker": worker, "principal": who, "session": session}
