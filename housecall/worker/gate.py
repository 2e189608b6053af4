"""The gate: asks the owner's policies and writes her ledger, before private data is used and before it leaves.

What must live here: every question to a policy, in one place, and what is written down of it. What must not: values. A
decision is made of labels, of who asks and of what the owner signed; nobody here could look at an element.

NOTE [In this order]
A release is decided, then an approval is spent, then the ledger is written and synced to the disk, then the value is
read. A crash between any two of these can spend an approval for nothing; it can never let out what the ledger lacks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from ..errors import HousecallError, LedgerError, PolicyError, UsageError
from ..types import Label
from ..wire.messages import Requested
from .approvals import Requests
from .ledger import Entry, Kind, Ledger
from .policy import Asked, Decision, Policy, decide

__all__ = ["Gate", "Opening", "Who"]

log = logging.getLogger(__name__)

MOST_REFUSALS = 20  # of one principal in a minute, each a line of the ledger; more are counted
_MINUTE = timedelta(minutes=1)


class Who(NamedTuple):
    """A principal, as the worker knows it: a name, and what it may be."""

    name: str
    role: str


def _now() -> datetime:
    return datetime.now(UTC)


class Gate:
    """One worker's. `policies` gives each data set's policy as it is now, and one that is missing denies; `requests`
    are those that the owner answers; `ledger` is told of every use, refusal and release: without it none happens."""

    def __init__(
        self,
        policies: Mapping[str, Policy] = MappingProxyType({}),
        requests: Requests | None = None,
        ledger: Ledger | None = None,
        *,
        now: Callable[[], datetime] = _now,
    ) -> None:
        self.policies, self.requests, self.ledger, self._now = policies, requests, ledger, now
        self._refusals: dict[Who, tuple[datetime, int]] = {}  # since when, and how many

    def load(self, who: Who, name: str) -> None:
        """Whether `who` may work on a data set with pointers. Raises `PolicyError`."""
        decision = self._decide((name,), Asked("interactive", who.name, who.role))
        self._note("run" if decision.allowed else "refusal", who, Label((name,)), "", decision.text)
        if not decision.allowed:
            raise PolicyError(decision.text)

    def release(self, who: Who, label: Label, digest: str) -> None:
        """Whether a value may leave; when this returns, it is in the ledger. Raises `PolicyError` or `LedgerError`."""
        asked = Asked("exact", who.name, who.role, digest=digest)
        decision = self._decide(label.sources, asked)
        if not decision.allowed and decision.approvable and digest and self.requests is not None:
            approval = self.requests.spend(who.name, who.role, "value", digest, label.sources, self._now())
            if approval is not None:
                self._note("approval", who, label, digest, f"request {approval.id}: used, as the owner signed")
                decision = self._decide(label.sources, msgspec.structs.replace(asked, approved=True))
                digest = f"{digest} (request {approval.id})"
        self._note("release" if decision.allowed else "refusal", who, label, digest, decision.text)
        if not decision.allowed:
            raise PolicyError(decision.text)

    def request(self, who: Who, label: Label, digest: str, program: str, reason: str) -> Requested:
        """Put a request before the owner. Raises `PolicyError` if no approval could ever permit it."""
        decision = self._decide(label.sources, Asked("exact", who.name, who.role))
        if decision.allowed:
            raise UsageError("there is nothing to ask: the policy lets these values out to you")
        if not decision.approvable or self.requests is None:
            raise PolicyError(f"asking is of no use: {decision.text}")
        made = self.requests.ask(who.name, who.role, "value", label.sources, digest, program, reason)
        self._note("request", who, label, digest, f"request {made.id}")
        return Requested(made.id, made.status, made.words)

    def status(self, who: Who, request: str) -> Requested:
        """How a request stands, for whoever made it. Raises `PolicyError` for any other."""
        if self.requests is None:
            raise PolicyError(f"there is no request {request[:40]!r}")
        found = self.requests.get(request, who.name, who.role)
        return Requested(found.id, found.status, found.words)

    def _decide(self, sources: tuple[str, ...], asked: Asked) -> Decision:
        return decide(self.policies, sources, asked, self._now())

    def _counted(self, who: Who) -> tuple[int, int]:
        """The number of this refusal within its minute, and how many of the minute before are in no line: whoever asks
        without end fills no disk."""
        since, count = self._refusals.get(who, (self._now(), 0))
        before = 0
        if self._now() - since >= _MINUTE:
            since, before, count = self._now(), max(0, count - MOST_REFUSALS), 0
        self._refusals[who] = since, count + 1
        return count + 1, before

    def _note(self, kind: Kind, who: Who, label: Label, digest: str, text: str) -> None:
        """Write the ledger. A release that cannot be written does not happen; nor does anything else."""
        if kind == "refusal":
            number, before = self._counted(who)
            if number > MOST_REFUSALS:
                return
            text += f" ({before:,} refusals more than these were counted before)" if before else ""
        log.info("%s: %s '%s' (%s) %s", kind, who.role, who.name, label, text)
        if self.ledger is None:
            raise LedgerError("this worker keeps no ledger, and without one nothing private is used or leaves")
        self.ledger.append(Entry(kind, f"{who.role} '{who.name}'", label.sources, digest, decision=text))


class Opening:
    """The door during one message: what is asked twice is decided, and written, once."""

    def __init__(self, gate: Gate, who: Who) -> None:
        self._gate, self._who = gate, who
        self._answers: dict[tuple[Label, str], HousecallError | None] = {}

    def ask(self, label: Label, digest: str) -> None:
        """Whether values of this label may leave now. Raises `PolicyError` or `LedgerError`."""
        key = label, digest
        if key not in self._answers:
            self._answers[key] = self._answer(label, digest)
        refusal = self._answers[key]
        if refusal is not None:
            raise refusal

    def _answer(self, label: Label, digest: str) -> HousecallError | None:
        try:
            self._gate.release(self._who, label, digest)
        except HousecallError as error:
            return error
        return None
