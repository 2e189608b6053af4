"""Exactly once and in order, over streams that break: one side's account of what it sent and what it received.

    sent  1 2 3 4 5 6        each side numbers what it sends from 1 and keeps it until it is acknowledged;
              └─ kept ─┘     after a break the other side says the last number it has, and the rest is sent again;
    received up to 4         what comes a second time is dropped, what skips a number is an error

A pure table: no threads, no network, no time. Both sides of a session use the same one.
"""

from __future__ import annotations

from collections import deque

from ..errors import ProtocolError
from .parcel import Parcel

__all__ = ["Line"]


class Line:
    """Numbered parcels out, numbers in. `received` is the last number that came."""

    def __init__(self) -> None:
        self.received = 0
        self.sent = 0
        self.kept_bytes = 0
        self._kept: deque[Parcel] = deque()

    def send(self, parcel: Parcel) -> None:
        """Keep the next parcel until it is acknowledged. Its number must follow the last one."""
        if parcel.number != self.sent + 1:
            raise ProtocolError(f"message {parcel.number} was to be sent after message {self.sent}")
        self.sent = parcel.number
        self.kept_bytes += parcel.nbytes
        self._kept.append(parcel)

    def parcel(self, number: int) -> Parcel | None:
        """The parcel of this number, `None` if it is acknowledged or not there yet."""
        at = number - (self.sent - len(self._kept) + 1)
        return self._kept[at] if 0 <= at < len(self._kept) else None

    def resume(self, number: int) -> None:
        """After a break the other side says that it has all up to `number`. Raises `ProtocolError` if it said before
        that it had more: what it acknowledged is gone."""
        if number < self.sent - len(self._kept):
            raise ProtocolError(f"all up to message {number} is said to have come, but more was acknowledged before")
        self.acknowledge(number)

    def acknowledge(self, number: int) -> None:
        """The other side has all up to `number`. Raises `ProtocolError` if that was never sent."""
        if number > self.sent:
            raise ProtocolError(f"message {number} was acknowledged, but only {self.sent} were sent")
        while self._kept and self._kept[0].number <= number:
            self.kept_bytes -= self._kept.popleft().nbytes

    def accept(self, number: int) -> bool:
        """Whether the message of this number is new. Raises `ProtocolError` if one before it is missing."""
        if number > self.received + 1:
            raise ProtocolError(f"message {number} came after message {self.received}: one is missing")
        if number <= self.received:
            return False
        self.received = number
        return True
