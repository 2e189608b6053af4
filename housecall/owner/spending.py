"""`Spending`: how much of each data set's budget is spent, by the ledger's account.

What must live here: reservations, and the sums. What must not: whether somebody may ask (`policy`), what a mechanism
costs (`statistics`).

NOTE [Reserved is spent]
A reservation is in the ledger, on the disk, before anything is computed, and nothing gives it back: not a failure, nor
a crash. So what is spent is the sum of what was reserved, and a crash anywhere can count too much, never too little.

NOTE [Simple composition]
Costs add up: releases that are epsilon_i-differentially private are (sum epsilon_i)-differentially private together
(Dwork and Roth 2014, theorem 3.16). So they are where whoever asks chooses each question, and what it costs, by the
answers so far, as long as the sum is held below a limit (Rogers and others 2016, "Privacy odometers and filters"). That
is sound and, for many small ones, wasteful. The mechanisms here are pure: they spend epsilon, and no delta. Sums are
exact, of the decimal numbers as the ledger prints them: ten times 0.1 is 1, no matter in what order.

NOTE [Of the data]
What is spent is spent of the data, whatever it is called: entries name it by the identity of its elements
(`Catalogue.content`). The same data under another name, or another version of its policy, begins with what is spent.
Other data, by one record too, begins anew; it has no policy until its owner has signed one for it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from fractions import Fraction

from msgspec import UNSET

from ..errors import LedgerError, PolicyError
from ..types import Unit
from .ledger import Entry, Ledger, Privacy, Sealed
from .policy import Budget

__all__ = ["Spending", "exact", "recount", "told"]


class Spending:
    """What is spent of the budgets of one worker's data sets; one for each ledger, for all of its threads.

    The ledger is read through once, here, before anybody else writes it. Raises `LedgerError` if it was changed."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._lock = threading.Lock()
        self._sums = recount(ledger.entries())  # by identity

    def left(self, identity: str, budget: Budget) -> float:
        """What is left of a budget for the data of this identity, 0 if more is spent than it has."""
        return float(max(Fraction(), exact(budget.epsilon) - self.spent(identity)))

    def spent(self, identity: str) -> Fraction:
        """What was spent of the data of this identity, by anybody."""
        with self._lock:
            return self._spent(identity)

    def reserve(self, entry: Entry, identity: str, budget: Budget, unit: Unit, epsilon: float) -> Sealed:
        """Spend epsilon of the budget for this data, protected by `unit`, and write `entry` of it: when this returns it
        is on the disk. Raises `PolicyError`, saying what the policy does, if the budget does not allow it, and
        `LedgerError` if it cannot be written."""
        if not identity:
            raise LedgerError("data without an identity has no budget")
        cost = exact(epsilon)
        if not cost > 0:
            raise PolicyError(f"lets nothing private out that costs epsilon {epsilon:g}")
        if budget.unit != unit:
            raise PolicyError(
                f"counts its budget by {budget.unit}, and the data protects each {unit}: one does not pay for the other"
            )
        with self._lock:
            spent = self._spent(identity)
            if spent + cost > exact(budget.epsilon):
                left = float(max(Fraction(), exact(budget.epsilon) - spent))
                raise PolicyError(
                    f"has {left:.12g} left of a budget of epsilon {budget.epsilon:.12g} for each {unit}, and this "
                    f"costs {epsilon:.12g}"
                )
            # Counted before it is written: if that fails nobody knows whether it was.
            self._sums[identity] = spent + cost
            return self._ledger.append(
                Entry(
                    "reserve",
                    entry.principal,
                    entry.data_sets,
                    privacy=Privacy(float(epsilon), 0.0, unit),
                    decision=entry.decision,
                    identity=identity,
                )
            )

    def _spent(self, identity: str) -> Fraction:
        return self._sums.get(identity, Fraction())


def recount(entries: Iterable[Sealed]) -> dict[str, Fraction]:
    """The sum of epsilon that was reserved of each data, by its identity."""
    sums: dict[str, Fraction] = {}
    for sealed in entries:
        entry = sealed.entry
        if entry.kind == "reserve" and entry.privacy is not None and entry.identity is not UNSET:
            sums[entry.identity] = sums.get(entry.identity, Fraction()) + exact(entry.privacy.epsilon)
    return sums


def told(budget: Budget, spent: Fraction) -> str:
    """What is spent of a budget, and what is left, in words."""
    left = float(max(Fraction(), exact(budget.epsilon) - spent))
    return f"epsilon {float(spent):.12g} of {budget.epsilon:.12g} is spent for each {budget.unit}, {left:.12g} is left"


def exact(value: float) -> Fraction:
    """The decimal number that a float prints as: what somebody wrote."""
    return Fraction(repr(float(value)))
