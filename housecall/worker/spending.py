"""`Spending`: how much of each data set's budget is spent, by the ledger's account.

What must live here: reservations, and the sums. What must not: how much may be spent (`policy.Budget`), whether a
release is allowed, what a mechanism costs.

NOTE [Reserved is spent]
A reservation is in the ledger before anything is computed. It is given back by `cancel` alone, which only its maker can
do, and only in the process that made it. So after a crash all that was reserved and not cancelled counts as spent.

NOTE [Simple composition]
Costs add up: k releases of (epsilon_i, delta_i) are (sum epsilon_i, sum delta_i)-differentially private together (Dwork
and Roth 2014, theorem 3.16). That is sound for any mechanisms, chosen adaptively, and wasteful for many small ones. The
accountant that knows the mechanisms, and composes more tightly, is to come; entries keep each event as it was.
Sums are exact, of the decimal numbers as the ledger prints them: ten times 0.1 is 1, no matter in what order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from ..errors import PolicyError, UsageError
from .ledger import Entry, Ledger, Privacy, Sealed
from .policy import Budget

__all__ = ["Reservation", "Spending"]


@dataclass(frozen=True)
class Reservation:
    """A cost that is spent unless it is cancelled. `sequence` is its entry's number."""

    sequence: int
    data_sets: tuple[str, ...]
    privacy: Privacy


@dataclass
class _Sum:
    epsilon: Fraction = Fraction()
    delta: Fraction = Fraction()


class Spending:
    """What is spent of the budgets of one worker's data sets. Safe to use from several threads; one for each ledger.

    `budgets` gives the budget of each data set by name, as it is now; one that is missing allows nothing. All entries
    are read once, here. Raises `LedgerError`."""

    def __init__(self, ledger: Ledger, budgets: Callable[[], Mapping[str, Budget]]) -> None:
        self._ledger, self._budgets = ledger, budgets
        self._lock = threading.Lock()
        self._sums: dict[tuple[str, str], _Sum] = {}
        self._open: dict[int, Reservation] = {}
        self._recount(ledger.entries())

    def spent(self, data_set: str, unit: str = "record") -> tuple[float, float]:
        """Sum of epsilon, and of delta, that is spent or reserved, for that unit of privacy."""
        with self._lock:
            found = self._sums.get((data_set, unit), _Sum())
            return float(found.epsilon), float(found.delta)

    def reserve(
        self,
        data_sets: str | Iterable[str],
        epsilon: float,
        delta: float,
        unit: str,
        *,
        principal: str = "",
        program: str = "",
        pipeline: tuple[str, ...] = (),
    ) -> Reservation:
        """Spend, before anything is computed, (epsilon, delta) of every one of these data sets: of all, or of none.

        When this returns it is in the ledger, on the disk. Raises `PolicyError` if a budget does not allow it, in the
        order of the names, `UsageError` if the cost is none, `LedgerError` if it cannot be written."""
        names = (data_sets,) if isinstance(data_sets, str) else tuple(sorted(set(data_sets)))
        cost = _cost(epsilon, delta, unit)
        if not names:
            raise UsageError("a reservation names no data set: public values cost nothing")
        with self._lock:
            budgets = self._budgets()
            for name in names:
                self._check(name, budgets.get(name), cost)
            sealed = self._ledger.append(
                Entry("reserve", principal, names, program, pipeline, cost, "within the budget")
            )
            made = Reservation(sealed.sequence, names, cost)
            self._count(made, 1)
            self._open[made.sequence] = made
        return made

    def commit(self, reservation: Reservation) -> Sealed:
        """Say that it was used: it can no more be cancelled. It was spent before, and is if this fails."""
        with self._lock:
            self._take(reservation)
            return self._ledger.append(self._answer("commit", reservation))

    def cancel(self, reservation: Reservation) -> Sealed:
        """Give it back: only if nothing that was computed for it left, nor will. If this fails it stays spent."""
        with self._lock:
            self._take(reservation)
            sealed = self._ledger.append(self._answer("cancel", reservation))
            self._count(reservation, -1)
            return sealed

    def _check(self, name: str, budget: Budget | None, cost: Privacy) -> None:
        if budget is None:
            raise PolicyError(f"data set '{name}' has no budget: its owner must set [budget] in its policy")
        if budget.unit != cost.unit:
            raise PolicyError(
                f"data set '{name}' protects each {budget.unit}, and the cost is for each {cost.unit}: "
                "one does not count as the other"
            )
        spent = self._sums.get((name, cost.unit), _Sum())
        # Of the same kind on both sides, and exact: a float could round a sum down to its limit.
        if spent.epsilon + _exact(cost.epsilon) > _exact(budget.epsilon) or (
            spent.delta + _exact(cost.delta) > _exact(budget.delta)
        ):
            raise PolicyError(
                f"data set '{name}' has a budget of epsilon {budget.epsilon:g}, delta {budget.delta:g} per "
                f"{budget.unit}; spent {float(spent.epsilon):g} and {float(spent.delta):g}, asked {cost.epsilon:g} "
                f"and {cost.delta:g}"
            )

    def _take(self, reservation: Reservation) -> None:
        if self._open.get(reservation.sequence) != reservation:
            raise UsageError(
                f"reservation {reservation.sequence} is not open: it was answered, or is of another process"
            )
        del self._open[reservation.sequence]

    def _answer(self, kind: str, reservation: Reservation) -> Entry:
        return Entry(
            "commit" if kind == "commit" else "cancel",
            data_sets=reservation.data_sets,
            privacy=reservation.privacy,
            of=reservation.sequence,
        )

    def _count(self, reservation: Reservation, sign: int) -> None:
        for name in reservation.data_sets:
            found = self._sums.setdefault((name, reservation.privacy.unit), _Sum())
            found.epsilon += sign * _exact(reservation.privacy.epsilon)
            found.delta += sign * _exact(reservation.privacy.delta)

    def _recount(self, entries: Iterable[Sealed]) -> None:
        """What is reserved and not cancelled. A cancel counts once, and only of what was not committed."""
        held: dict[int, Reservation] = {}
        for sealed in entries:
            entry = sealed.entry
            if entry.kind == "reserve" and entry.privacy is not None:
                held[sealed.sequence] = Reservation(sealed.sequence, entry.data_sets, entry.privacy)
                self._count(held[sealed.sequence], 1)
            elif entry.kind in ("commit", "cancel") and entry.of in held:
                found = held.pop(entry.of)
                if entry.kind == "cancel":
                    self._count(found, -1)


def _exact(value: float) -> Fraction:
    """The decimal number that a float prints as: what its owner wrote."""
    return Fraction(repr(float(value)))


def _cost(epsilon: float, delta: float, unit: str) -> Privacy:
    if unit not in ("record", "person"):
        raise UsageError(f"unit {unit!r}: expected 'record' or 'person'")
    if not (0 <= epsilon <= 1e9 and 0 <= delta <= 1):
        raise UsageError(f"epsilon {epsilon} and delta {delta}: expected 0 to 1e9, and 0 to 1")
    return Privacy(float(epsilon), float(delta), "record" if unit == "record" else "person")
