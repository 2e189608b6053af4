"""Asking a worker's owner for a value, or to let a program run: a request, and the wait for her answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console

from ..errors import OperatorError, PolicyError, UsageError
from ..program.call import Program
from ..program.ops import operator
from ..wire.messages import Define, Message, Requested, Result, Status, Submit
from ..wire.messages import Request as Ask
from .session import Session
from .slot import Slot

__all__ = ["OwnersAnswer", "ask_gate", "ask_owner", "ask_to_run", "check_asked"]


class OwnersAnswer:
    """A request to an owner. `status` asks how it stands, `wait` until she has decided.

    Approved, the value can be fetched once, as it was when it was asked for: `.get()`. A program can be run on what it
    was submitted for, by calling it. `digest` names what was asked for; the `id` is empty if nobody needs to answer."""

    def __init__(self, session: Session, said: Requested) -> None:
        self.id, self.digest = said.request, said.digest
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
        name = f"request {self.id}" if self.id else "question"
        return f"<{name} to '{self._session.location.id}', {self._said.status}{words}>"


def ask_owner(session: Session, slots: Iterable[Slot], reason: str) -> OwnersAnswer:
    """Ask for these values. Raises `UsageError` without a reason, `PolicyError` if nothing could come of it."""
    _check(reason, "request('what I need it for')")
    said: Any = session.ask(Ask(tuple(slot.id for slot in slots), reason))
    return OwnersAnswer(session, said)


def ask_to_run(
    session: Session, program: Program, digest: str, slots: Iterable[Slot], reason: str, runs: int
) -> OwnersAnswer:
    """Ask to let a program run on these slots. Raises as `ask_owner` does."""
    check_asked(reason, runs)
    if any(operator(call.op).random for call in program.calls):
        session.seed()  # the generator's state is to be hers already: a worker refuses one that private data has moved
    session.tell(Define(program))
    said: Any = session.ask(Submit(digest, tuple([slot.id for slot in slots]), reason, runs))
    return OwnersAnswer(session, said)


def check_asked(reason: str, runs: int) -> None:
    """Raise `UsageError` where an owner could not tell why, or how often, a program is to run."""
    _check(reason, "submit(..., reason='what I need it for')")
    if isinstance(runs, bool) or not isinstance(runs, int) or runs < 1:
        raise UsageError(f"a program is to run once or more, not {runs!r} times")


def ask_gate(session: Session, message: Message, operator: str) -> Result:
    """Ask what an owner's policy decides, and wait: a refusal is what it is, not a failed call. Raises `PolicyError`
    and `UsageError` as the worker says them."""
    try:
        return session.ask(message)
    except OperatorError as error:
        kind, _, reason = error.reason.partition(": ")
        if error.operator != operator or kind not in _SAID:
            raise
        raise _SAID[kind](f"worker '{error.worker}': {reason}") from None


_SAID = {"PolicyError": PolicyError, "UsageError": UsageError}


def _check(reason: str, how: str) -> None:
    if not reason.strip():
        raise UsageError(f"an owner wants to read why: {how}")
