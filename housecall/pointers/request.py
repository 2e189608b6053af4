"""Asking a worker's owner for a value: a request, and the wait for her answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console

from ..errors import PolicyError, UsageError
from ..wire.messages import Request as Ask
from ..wire.messages import Requested, Status
from .session import Session, Slot

__all__ = ["OwnersAnswer", "ask_owner"]


class OwnersAnswer:
    """A request to an owner. `status` asks how it stands, `wait` until she has decided.

    Approved, the value can be fetched once, as it was when it was asked for: `.get()`."""

    def __init__(self, session: Session, said: Requested) -> None:
        self.id = said.request
        self._session = session
        self._said = said

    @property
    def status(self) -> str:
        """ "pending", "approved" or "denied"; one round trip while it is pending."""
        if self._said.status == "pending":
            said = self._session.ask(Status(self.id))
            assert isinstance(said, Requested)
            self._said = said
        return self._said.status

    @property
    def words(self) -> str:
        """What the owner said with it."""
        return self._said.words

    def wait(
        self,
        timeout: float | None = None,
        *,
        every: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> OwnersAnswer:
        """Wait until the owner has decided, `timeout` seconds at most. Raises `PolicyError` if she denies, and
        `TimeoutError` if she has not answered; the request stays, and can be waited for again."""
        started = clock()
        where = self._session.location.id
        with Console(stderr=True).status(f"request {self.id}: waiting for the owner of '{where}'"):
            while self.status == "pending":
                if timeout is not None and clock() - started >= timeout:
                    raise TimeoutError(f"the owner of '{where}' has not answered request {self.id} in {timeout:g} s")
                sleep(every)
        if self.status == "denied":
            raise PolicyError(f"the owner of '{where}' denied request {self.id}: {self.words or 'no reason given'}")
        return self

    def __repr__(self) -> str:
        words = f": {self.words}" if self.words else ""
        return f"<request {self.id} to '{self._session.location.id}', {self._said.status}{words}>"


def ask_owner(session: Session, slots: Iterable[Slot], reason: str) -> OwnersAnswer:
    """Ask for these values. Raises `UsageError` without a reason, `PolicyError` if nothing could come of it."""
    if not reason.strip():
        raise UsageError("an owner wants to read why: request('what I need it for')")
    said: Any = session.ask(Ask(tuple(slot.id for slot in slots), reason))
    return OwnersAnswer(session, said)
