"""What is spent of the budgets of a worker's data, in words: from its ledger, whether it runs or not. Imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import LedgerError
from ..owned.catalogue import Catalogue
from ..owner.ledger import Account
from ..owner.policies import standing
from ..owner.spending import recount, told
from ..privacy.accounting import Cost

__all__ = ["budgets"]


def budgets(place: Path, public: bytes, only: str = "") -> Iterator[str]:
    """A sentence for each data set that has a budget, or spent of one, or `only` for one; and one for data that is
    gone. Two names of the same data both say what is spent of it."""
    spent, here = _spent(place), set()
    catalogue = Catalogue(place)
    for name in catalogue.names():
        content = catalogue.content(name)
        used = spent.get(content, Cost())
        here.add(content)
        budget = standing(place, name, public)[0].budget
        if (any(used) or budget.epsilon) and only in ("", name):
            yield f"{name}: {told(budget, used)}"
    gone = [used for content, used in spent.items() if content not in here]
    if gone and not only:
        epsilon, rho = (float(sum(parts)) for parts in zip(*gone, strict=True))
        yield f"data that is not here any more, or was replaced: epsilon {epsilon:.12g} and rho {rho:.6g} in all"


def _spent(place: Path) -> dict[str, Cost]:
    try:
        account = Account(place)
    except LedgerError:  # none was begun
        return {}
    return recount(account.entries())
