"""What one session has been lent of the owner's data, and whether that is still the data that has the name.

What must live here: binding the columns of a data set, and the refusal of all that derives from data which was removed
or replaced meanwhile: the rules of what bears the name now are not its own. What must not: what a policy permits
(`gate`), what an account is (`store`).
"""

from __future__ import annotations

from typing import Protocol

import torch

from ..errors import DataError, PolicyError, ProgramError
from ..owned.catalogue import Catalogue
from ..program.call import HOLE
from ..program.typing import type_of
from ..types import Label
from ..wire.messages import Column, Failure, Load
from .gate import Gate, Uses, Who
from .limits import Meter
from .store import Store
from .submission import Submissions

__all__ = ["Loans", "Premises"]


class Premises(Protocol):
    """What all sessions of a worker share: a `Worker`."""

    catalogue: Catalogue
    gate: Gate
    device: torch.device


class Loans:
    """One session's. `read`: the data sets that it has loaded, and the identity of the data that each was then."""

    def __init__(self, worker: Premises, who: Who, store: Store, submissions: Submissions) -> None:
        self._worker, self._who, self._store, self._submissions = worker, who, store, submissions
        self.read: dict[str, str] = {}
        self.uses = Uses(lambda: worker.gate, who)

    def lend(self, message: Load, meter: Meter | None) -> None:
        """Bind the columns of a data set. Raises `PolicyError` if its policy forbids it, or the name meant other data
        before; `DataError` if it is not what was found; `ProgramError` for ids that are taken; `LimitError`."""
        name, ids = message.name, message.ids
        self._check_ids(ids)
        identity = self._worker.catalogue.identity(name)
        self._check_same(name, identity)  # before the new data's policy says what may be done with what bears the name
        self.uses.load(name, identity)
        columns, label, found = self._worker.catalogue.lent(name)
        if found != identity:  # what was permitted was of other data
            self.uses.close(name)
        self.guard(meter)
        if found != identity:
            raise self.refused(name)
        self.read[name] = found
        _check_found(message, columns)
        if len(ids) != len(columns):
            raise ProgramError(f"data set '{name}' has {len(columns)} columns; {len(ids)} ids were to be bound: {ids}")
        away = self._worker.device.type != "cpu"  # then the session gets copies, which it pays for
        if meter is not None:
            meter.check_room("load", len(ids), sum(column.nbytes for column in columns.values()) if away else 0)
        for ref, (title, column) in zip(ids, columns.items(), strict=True):
            self._bind(ref, column, label)
            self._submissions.lent(ref, name, title, found)
            if meter is not None:
                meter.history.lent(ref, f"{name}.{title}", self._store)

    def guard(self, meter: Meter | None) -> None:
        """Let a meter ask before it reads what is for programs only, if anything is."""
        if meter is not None:
            meter.may_use = self._may_use if self.uses.closed else None

    def gone(self) -> frozenset[str]:
        """The data sets that were removed or replaced since this session loaded them."""
        identity = self._worker.catalogue.identity
        return frozenset([name for name, data in self.read.items() if identity(name) != data])

    def check(self, sources: tuple[str, ...]) -> None:
        """Refuse what derives from data that is gone. Raises `PolicyError`."""
        for name in sorted(self.gone().intersection(sources)) if sources else ():
            raise self.refused(name)

    def stays(self, ref: int, gone: frozenset[str]) -> Failure | None:
        """The refusal of a slot's value, if it derives from data that is gone."""
        sources = gone.intersection(self._store.label(ref).sources) if gone else ()
        return Failure(0, 0, "release", _replaced(min(sources)), writes=False) if sources else None

    def refused(self, name: str) -> PolicyError:
        """Why something stays that derives from data which is gone; it is in the ledger."""
        self._worker.gate.refuse(self._who, Label((name,)), _replaced(name))
        return PolicyError(_replaced(name))

    def _bind(self, ref: int, column: torch.Tensor, label: Label) -> None:
        if self._worker.device.type == "cpu":
            self._store.lend(ref, column, label)
            return
        self._store[ref] = column.to(self._worker.device)
        self._store.count(ref, self._store[ref])
        self._store.mark((ref,), label, failed=False)

    def _check_ids(self, ids: tuple[int, ...]) -> None:
        for ref in ids:
            if ref <= HOLE or ref in self._store:
                raise ProgramError(f"%{ref} is bound already, or no id; bind each id once")
        if len(set(ids)) != len(ids):
            raise ProgramError(f"an id is to be bound twice: {ids}; bind each id once")

    def _may_use(self, label: Label) -> None:
        """Before a call reads values of this label. Raises `PolicyError` if they are for programs only, whatever is
        permitted on other data that has the name now."""
        self.check(self.uses.among(label))
        self.uses.check(label)

    def _check_same(self, name: str, identity: str) -> None:
        """In one session a name means one data set, as long as anything derives from it. Raises `PolicyError` if this
        is another one."""
        if self.read.get(name, identity) != identity and self._holds(name):
            raise self.refused(name)

    def _holds(self, name: str) -> bool:
        """Whether anything here derives from a data set of this name: a value, or what randomness will give."""
        labels = [self._store.drawn, *(cell.label for cell in self._store.cells.values())]
        return any(name in label.sources for label in labels)


def _check_found(message: Load, columns: dict[str, torch.Tensor]) -> None:
    """Refuse to bind what has another schema, or count, than was found: its caller would take it for what it is not."""
    if message.count:
        now = tuple([Column(name, type_of(one).dtype, tuple(one.shape[1:])) for name, one in columns.items()])
        count = len(next(iter(columns.values())))
        if (message.count, message.columns) != (count, now):
            raise DataError(
                f"data set '{message.name}' was replaced since it was found: it has {count:,} records of "
                f"{', '.join(column.name for column in now)} now; look it up anew"
            )


def _replaced(name: str) -> str:
    return (
        f"data set '{name}' was removed or replaced since this session loaded it: what derives from the old data stays "
        "at the worker. Let go of it (`worker.clear()` frees all that you hold there), and look the data set up anew"
    )
