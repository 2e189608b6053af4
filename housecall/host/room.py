"""Room for what comes in: memory that all sessions of a worker share, taken before a byte of it is kept.

    total     for all together          each   for one session, so that it does not wait for itself alone
    half      for one principal, so that it cannot keep others out
    a single frame has room whatever its size, when there is no other

Whoever finds no room waits, oldest first; its stream is left unread meanwhile, which holds its sender up. Frames that
are whole need no more room to be done, so room comes back, unless somebody begins frames and does not go on with them:
whoever lends room watches for that (`wanted`).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

__all__ = ["Claim", "Room"]

ARRIVAL_S = 30.0  # seconds that a frame may take to arrive while others wait for room,
ARRIVAL_RATE = 1_000_000.0  # and one more for each so many bytes of its tensors


class _Ticket:
    """Who waits for how much. `whose`: a session and its principal, which share its bounds with others."""

    __slots__ = ("nbytes", "principal", "session")

    def __init__(self, session: str, principal: str, nbytes: int) -> None:
        self.session, self.principal, self.nbytes = session, principal, nbytes


class Room:
    """`total` bytes for all, of which one session has at most `each` and one principal at most half."""

    def __init__(self, total: int, each: int) -> None:
        self.total, self.each = total, min(each, total)
        self.used = 0
        self._changed = threading.Condition()
        self._sessions: Counter[str] = Counter()
        self._principals: Counter[str] = Counter()
        self._waiting: list[_Ticket] = []  # oldest first

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for what others have: not for what is its own."""
        with self._changed:
            return any(self._within_its_own(ticket) for ticket in self._waiting)

    def take(self, session: str, principal: str, nbytes: int, still: Callable[[], bool]) -> bool:
        """Wait for room, and take it; `False`, and nothing is taken, if it is not wanted any more (`still`)."""
        ticket = _Ticket(session, principal, nbytes)
        with self._changed:
            if self._waiting or not self._fits(ticket):
                self._waiting.append(ticket)
                try:
                    self._changed.wait_for(lambda: not still() or self._is_next(ticket))
                finally:
                    self._waiting.remove(ticket)
                    self._changed.notify_all()
                if not still():
                    return False
            self.used += nbytes
            self._sessions[session] += nbytes
            self._principals[principal] += nbytes
            return True

    def give_back(self, session: str, principal: str, nbytes: int) -> None:
        """What was taken is free again."""
        with self._changed:
            self.used -= nbytes
            _less(self._sessions, session, nbytes)
            _less(self._principals, principal, nbytes)
            if self._waiting:
                self._changed.notify_all()

    def look_again(self) -> None:
        """Something that `still` asks for has changed."""
        with self._changed:
            self._changed.notify_all()

    def _is_next(self, ticket: _Ticket) -> bool:
        for other in self._waiting:
            if other is ticket:
                return self._fits(ticket)
            if self._within_its_own(other):  # it waits for others, and came before
                return False
        return self._fits(ticket)

    def _fits(self, ticket: _Ticket) -> bool:
        return self._within_its_own(ticket) and (not self.used or self.used + ticket.nbytes <= self.total)

    def _within_its_own(self, ticket: _Ticket) -> bool:
        by_session, by_principal = self._sessions[ticket.session], self._principals[ticket.principal]
        return (not by_session or by_session + ticket.nbytes <= self.each) and (
            not by_principal or by_principal + ticket.nbytes <= self.total // 2
        )


def _less(held: Counter[Any], whose: Any, nbytes: int) -> None:
    held[whose] -= nbytes
    if not held[whose]:
        del held[whose]


class Claim:
    """What one frame has taken, of two kinds of room: for its head, and for what follows it. Given back as a whole.

    Two, since a frame waits for the second while it holds the first: those that hold the second wait for nobody."""

    def __init__(
        self,
        heads: Room,
        blobs: Room,
        session: str,
        principal: str,
        still: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._rooms = (heads, blobs)
        self._taken = [0, 0]
        self._whose = session, principal
        self._still, self._clock = still, clock
        self._lock = threading.Lock()
        self._since: float | None = None  # since when it waits for its sender alone

    def head(self, nbytes: int) -> bool:
        """Take room for a head; whether it is still wanted."""
        return self._take(0, nbytes)

    def blobs(self, nbytes: int) -> bool:
        """Take room for what follows it."""
        return self._take(1, nbytes)

    def release(self) -> None:
        """Give all back; harmless when that is done."""
        with self._lock:
            taken, self._taken = self._taken, [0, 0]
        for room, nbytes in zip(self._rooms, taken, strict=True):
            if nbytes:
                room.give_back(*self._whose, nbytes)

    def is_late(self) -> bool:
        """Whether its sender takes longer with it than anybody should while others wait for room."""
        since = self._since
        return since is not None and self._clock() - since > ARRIVAL_S + self._taken[1] / ARRIVAL_RATE

    def _take(self, kind: int, nbytes: int) -> bool:
        self._since = None
        if not self._rooms[kind].take(*self._whose, nbytes, self._still):
            return False
        self._taken[kind] += nbytes
        self._since = self._clock()
        return True
