"""VirtualWorker: a real worker and a session to it, in this process. Same door, same messages, no wire."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .errors import UsageError
from .owned.catalogue import Catalogue
from .owned.description import check_unit, check_words
from .owned.mocks import Fakes
from .owner.policy import DENY, Policy
from .pointers.location import Location
from .pointers.session import Session
from .transport.memory import MemoryTransport
from .types import Unit
from .worker.owner import Owner
from .worker.worker import Worker

__all__ = ["VirtualWorker"]


class VirtualWorker(Location):
    """A worker in this process, for simulation, teaching and tests.

    `hook` is accepted for the classic signature. `synchronous=True` runs every call at once, so that an error
    stands at the line that makes it; `codec=True` puts every message through bytes, as on a wire.
    """

    def __init__(self, hook: Any = None, id: str = "worker", *, synchronous: bool = False, codec: bool = False) -> None:
        if isinstance(hook, str):
            raise UsageError(f"VirtualWorker takes a hook first: write VirtualWorker(id={hook!r})")
        if not isinstance(id, str) or not id:
            raise UsageError(f"a worker's id is a name such as 'clinic', found {id!r}")
        self.worker = Worker(id)
        self._door = self.worker.open("me")
        transport = MemoryTransport(self._door, name=id, codec=codec)
        super().__init__(id, Session(transport, self, synchronous=synchronous))

    @functools.cached_property
    def owner(self) -> Owner:
        """The owner of this worker's data, since she is here: her policies, requests and ledger."""
        owner = Owner()
        self.worker.gate = owner.gate
        return owner

    def add(
        self,
        name: str,
        /,
        *,
        tags: Sequence[str] = (),
        description: str = "",
        mock: Mapping[str, torch.Tensor] | Fakes | None = None,
        unit: Unit = "record",
        person: str = "",
        policy: Policy | None = None,
        replace: bool = False,
        **columns: torch.Tensor,
    ) -> None:
        """Register a data set of the worker's owner: `worker.add("heart", x=table, y=labels, tags=["#heart"])`.

        Columns are tensors with as many records each, (records, ...). Any session finds the set with `search`; `policy`
        says who may use it and what may leave, and without one nobody may. `mock` is for whoever finds it, whatever the
        policy says: columns of made-up records, as many as you like, or `Fakes(records=100, x=(0, 1))`.

        `unit="person"` protects all records of a person together: `person="subject"` names the column that says whose
        each is; it stays here, and is not offered. Raises `DataError` or `UsageError` for what cannot be a data set,
        and `PolicyError` for a policy that protects less than `unit`."""
        check_words(
            tags=tags, description=description, mock=mock, unit=unit, person=person, policy=policy, replace=replace
        )
        rules, policies = DENY if policy is None else policy, self.owner.policies
        options: Any = {"mock": mock, "unit": unit, "person": person}
        check_unit(Catalogue().register(name, columns, tags, description, **options), rules)
        if replace or name not in self.worker.catalogue.names():
            policies.forget(name)  # so that the old rules never hold for the new data
        self.worker.catalogue.register(name, columns, tags, description, replace=replace, **options)
        policies.register(name, rules)

    def remove(self, name: str) -> None:
        """Remove a data set of the worker's owner, and its policy. Raises `DataError` if there is none of this name.

        A session that holds something of it may go on computing with it; nothing of it leaves the worker any more,
        whatever is registered under this name later. What was spent of its budget stays spent: it belongs to the data.
        """
        self.worker.catalogue.remove(name)
        self.owner.policies.forget(name, "its data set was removed")

    @property
    def _objects(self) -> dict[int, torch.Tensor]:
        """What the worker holds for this session, by id. Waits until it has done what was asked so far."""
        self.session.wait()
        return self._door.store.tensors()

    def __repr__(self) -> str:
        return f"<VirtualWorker id:{self.id} #objects:{len(self._objects)}>"
