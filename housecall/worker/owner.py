"""The owner's side of a worker: her key, policies, requests and ledger, and the gate that they make together."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

from ..owner.approvals import Approval, Request, Requests
from ..owner.change import loosens
from ..owner.ledger import Entry, Ledger
from ..owner.policies import Policies, Turn
from ..owner.signing import OwnerKey, public_key
from .gate import Gate

__all__ = ["Owner", "gate_of"]

_LONGEST = 10_000  # characters of what changed: an entry has its limit


class Owner:
    """An owner in this process, in memory: for notebooks, teaching and tests. What she decides holds at once."""

    def __init__(self) -> None:
        self._key = OwnerKey.generate()
        self.ledger = Ledger()
        self.policies = Policies(changed=_noting(self.ledger))
        self.requests = Requests(None, self._key.public)
        self.gate = Gate(self.policies, self.requests, self.ledger)

    def pending(self) -> tuple[Request, ...]:
        """The requests that wait for an answer, the oldest first. `print(request.program)` shows what was done."""
        return self.requests.pending()

    def approve(
        self,
        id: str,
        *,
        uses: int = 1,
        expires: datetime | None = None,
        words: str = "",
        release: bool = False,
    ) -> Approval:
        """Let a value out, or a program run: once unless said otherwise, within 24 hours unless said otherwise.
        `release`: and what the program makes may leave, exactly."""
        made = self.requests.approve(id, self._key, uses, expires, words, release=release)
        self.gate.notice()
        return made

    def deny(self, id: str, reason: str) -> Request:
        """Do not."""
        denied = self.requests.deny(id, reason)
        self.gate.notice()
        return denied


def gate_of(folder: str | os.PathLike[str]) -> Gate:
    """The gate of a worker that runs from a folder: what its owner signed there, and its ledger.

    Raises `PolicyError` without an owner's key, `LedgerError` for a ledger that cannot be trusted or written."""
    place = Path(folder)
    public = public_key(place)
    ledger = Ledger(place)
    return Gate(Policies(place, public, changed=_noting(ledger)), Requests(place, public), ledger)


class _noting:  # noqa: N801  # used as a function
    """Writes each change of a policy into the ledger, before it takes effect."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def __call__(self, turn: Turn) -> None:
        self._ledger.append(Entry("policy", "owner", (turn.name,), decision=_said(turn)[:_LONGEST]))


def _said(turn: Turn) -> str:
    """A change of a policy in words: whether it permits more, and which text it is."""
    if turn.why:
        return f"nothing is permitted any more: {turn.why}"
    version = f"version {turn.new.version}, SHA-256 {turn.digest}"
    if turn.old is None:
        return f"{version}; the one before is not known to this process"
    looser = loosens(turn.old, turn.new)
    return f"{version}: LOOSER: {'; '.join(looser)}" if looser else f"{version}: permits nothing more than before"
