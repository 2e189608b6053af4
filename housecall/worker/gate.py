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
from datetime import UTC, datetime
from typing import Any, NamedTuple

from ..errors import HousecallError, PolicyError
from ..types import Label
from ..wire.messages import Requested
from .policy import Asked, Decision, Policy, decide

__all__ = ["Gate", "Opening", "Who"]

log = logging.getLogger(__name__)


class Who(NamedTuple):
    """A principal, as the worker knows it: a name, and what it may be."""

    name: str
    role: str


def _now() -> datetime:
    return datetime.now(UTC)


class Gate:
    """One worker's: `policies` gives the policy of each data set by name, as it is now; one that is missing denies."""

    def __init__(
        self,
        policies: Callable[[], Mapping[str, Policy]] = dict,
        ledger: Any = None,
        requests: Any = None,
        *,
        now: Callable[[], datetime] = _now,
    ) -> None:
        self.ledger, self.requests = ledger, requests
        self._policies, self._now = policies, now

    def load(self, who: Who, name: str) -> None:
        """Whether `who` may work on a data set with pointers. Raises `PolicyError`."""
        self._must(self._decide((name,), Asked("interactive", who.name, who.role)), who, Label((name,)), "")

    def release(self, who: Who, label: Label, digest: str) -> None:
        """Whether a value may leave; when this returns, it is in the ledger. Raises `PolicyError` or `LedgerError`."""
        decision = self._decide(label.sources, Asked("exact", who.name, who.role))
        self._must(decision, who, label, digest)

    def request(self, who: Who, label: Label, digest: str, program: str, reason: str) -> Requested:
        """Put a request before the owner."""
        raise PolicyError("no requests")

    def status(self, who: Who, request: str) -> Requested:
        """How a request stands, for whoever made it."""
        raise PolicyError("no requests")

    def _decide(self, sources: tuple[str, ...], asked: Asked) -> Decision:
        return decide(self._policies(), sources, asked, self._now())

    def _must(self, decision: Decision, who: Who, label: Label, digest: str) -> None:
        if not decision.allowed:
            log.info("refused %s '%s' (%s): %s", who.role, who.name, label, decision.rule)
            raise PolicyError(decision.text)


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
