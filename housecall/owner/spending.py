"""`Spending`: how much of each data set's budget is spent, by the ledger's account.

What must live here: reservations, and the sums. What must not: whether somebody may ask (`policy`), what a mechanism
costs (`statistics`).

NOTE [Reserved is spent]
A reservation is in the ledger, on the disk, before anything is computed, and nothing gives it back: not a failure, nor
a crash. So what is spent is the sum of what was reserved, and a crash anywhere can count too much, never too little.

How costs add up is told in `privacy.accounting`.

NOTE [Of the data]
What is spent is spent of the data, whatever it is called: entries name it by the identity of its elements
(`Catalogue.content`). The same data under another name, or another version of its policy, begins with what is spent.
Other data, by one record too, begins anew; it has no policy until its owner has signed one for it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from fractions import Fraction

import msgspec
from msgspec import UNSET

from ..errors import LedgerError, PolicyError
from ..privacy.accounting import Cost, exact
from ..types import Unit
from .ledger import Entry, Ledger, Privacy, Sealed
from .policy import Budget

__all__ = ["Spending", "recount", "told"]

_NOTHING = Cost()


class Spending:
    """What is spent of the budgets of one worker's data sets; one for each ledger, for all of its threads.

    The ledger is read through once, here, before anybody else writes it. Raises `LedgerError` if it was changed."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._lock = threading.Lock()
        self._sums = recount(ledger.entries())  # by identity

    def left(self, identity: str, budget: Budget) -> float:
        """What is left of a budget for the data of this identity, 0 if more is spent than it has."""
        return _left(budget, self.spent(identity))

    def spent(self, identity: str) -> Cost:
        """What was spent of the data of this identity, by anybody."""
        with self._lock:
            return self._spent(identity)

    def reserve(
        self, entry: Entry, identity: str, budget: Budget, unit: Unit, epsilon: float = 0.0, rho: float = 0.0
    ) -> Sealed:
        """Spend epsilon, or rho, of the budget for this data, protected by `unit`, and write `entry` of it: when this
        returns it is on the disk. Raises `PolicyError`, saying what the policy does, if the budget does not allow it,
        and `LedgerError` if it cannot be written."""
        with self._lock:
            now = self._after(identity, budget, unit, epsilon, rho)
            # Counted before it is written: if that fails nobody knows whether it was.
            self._sums[identity] = now
            event = Privacy(float(epsilon), 0.0, unit, float(rho) if rho else UNSET)
            return self._ledger.append(msgspec.structs.replace(entry, kind="reserve", privacy=event, identity=identity))

    def check(self, identity: str, budget: Budget, unit: Unit, epsilon: float = 0.0, rho: float = 0.0) -> None:
        """Whether `reserve` would spend that now. Raises as it does, and spends nothing."""
        with self._lock:
            self._after(identity, budget, unit, epsilon, rho)

    def _after(self, identity: str, budget: Budget, unit: Unit, epsilon: float, rho: float) -> Cost:
        """What will be spent once this is. Raises `PolicyError` and `LedgerError`."""
        if not identity:
            raise LedgerError("data without an identity has no budget")
        cost = Cost(exact(epsilon), exact(rho))
        if not (cost.epsilon >= 0 and cost.rho >= 0 and any(cost)):
            raise PolicyError(f"lets nothing private out that costs epsilon {epsilon:g} and rho {rho:g}")
        if budget.unit != unit:
            raise PolicyError(
                f"counts its budget by {budget.unit}, and the data protects each {unit}: one does not pay for the other"
            )
        spent = self._spent(identity)
        now = spent.also(cost)
        if now.at(budget.delta) > exact(budget.epsilon):
            raise PolicyError(_too_little(budget, unit, spent, now))
        return now

    def _spent(self, identity: str) -> Cost:
        return self._sums.get(identity, _NOTHING)


def recount(entries: Iterable[Sealed]) -> dict[str, Cost]:
    """The sum of what was reserved of each data, by its identity."""
    sums: dict[str, Cost] = {}
    for sealed in entries:
        entry = sealed.entry
        if entry.kind == "reserve" and entry.privacy is not None and entry.identity is not UNSET:
            rho = entry.privacy.rho
            cost = Cost(exact(entry.privacy.epsilon), Fraction() if rho is UNSET else exact(rho))
            sums[entry.identity] = sums.get(entry.identity, _NOTHING).also(cost)
    return sums


def told(budget: Budget, spent: Cost) -> str:
    """What is spent of a budget, and what is left, in words."""
    at = f" (of it by updates, at delta {budget.delta:g}: rho {float(spent.rho):.6g})" if spent.rho else ""
    return (
        f"epsilon {_epsilon(budget, spent)} of {budget.epsilon:.12g} is spent for each {budget.unit}{at}, "
        f"{_left(budget, spent):.12g} is left"
    )


def _left(budget: Budget, spent: Cost) -> float:
    return float(max(Fraction(), exact(budget.epsilon) - spent.at(budget.delta)))


def _epsilon(budget: Budget, spent: Cost) -> str:
    return f"{float(spent.at(budget.delta)):.12g}"


def _too_little(budget: Budget, unit: Unit, spent: Cost, now: Cost) -> str:
    if now.rho and not budget.delta:
        return "has no delta, and what is noised as updates are needs one (budget.delta, 1e-6 for instance)"
    costs = float(now.at(budget.delta)) - float(spent.at(budget.delta))
    return (
        f"has {_left(budget, spent):.12g} left of a budget of epsilon {budget.epsilon:.12g} for each {unit}, and this "
        f"costs {costs:.12g}"
    )
