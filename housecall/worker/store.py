"""What one session keeps at a worker: id -> value or failure, the tags it gave, and whose memory that is.

A slot that is counted has a spec, the type of its value, and a `Cell`, the account of its storage. Aliases of one
storage share one cell, however they came to be: storages are told apart by identity, not by what an operator's schema
says of them. So a view keeps the charge of the base that it outlives, and a charge ends with the last slot of its
cell. What the owner lends a session is not charged to it, and may not be written.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from ..errors import ProgramError, ProtocolError
from ..program.call import Call, Items, refs
from ..program.check import written_by
from ..program.ops import operator
from ..program.outcome import Spec, spec_of
from ..program.typing import address_of
from ..types import PUBLIC, Label, Ref
from ..wire.messages import Failure, Info, Tag

__all__ = ["Cell", "Draws", "Failed", "Halt", "Missing", "Store", "writes"]


class Failed(Exception):
    """Stands in the place of a value whose call failed; reading it raises it."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


class Halt:
    """NOTE [After a failure]
    A caller issues long before she hears that a call has failed. In Python she would have stopped at that line; here
    what she issued after it arrives as well. So from a failure on, until she has heard of it, nothing is changed in
    place: an optimizer does not step on gradients that are not there. `cause` is what failed, `None` if all is well.

    What fails on private data is no cause: that it failed is not told."""

    __slots__ = ("cause",)

    def __init__(self) -> None:
        self.cause: Failed | None = None

    def check(self, call: Call) -> None:
        """Raise the cause for a call that would change something in place."""
        if self.cause is not None and writes(call):
            raise self.cause


class Missing(ProtocolError):
    """An id that this session does not hold."""


def writes(call: Call) -> list[tuple[str, int]]:
    """What a call writes to: the name of the parameter, and the id."""
    return [(param.name, ref) for param, arg in written_by(operator(call.op), call) for ref in refs(arg)]


class Cell:
    """One storage's account: the bytes that it is charged with, how many slots alias it, from which owned data sets its
    elements derive, whether a call that was to make them failed on private data (see `private`), and how often it was
    written to."""

    __slots__ = ("address", "failed", "label", "nbytes", "slots", "writes")

    def __init__(self, address: int, nbytes: int) -> None:
        self.address = address
        self.nbytes = nbytes
        self.slots = 0
        self.writes = 0
        self.label = PUBLIC
        self.failed = False


class Draws(NamedTuple):
    """How many calls of a program draw random numbers, and whether how much they draw may depend on elements."""

    calls: int
    by_elements: bool


class Store(dict[int, Any]):
    """The slots of one session: a dict, since a call reads and binds ids and nothing else.

    `count`, `lend` and `drop` keep the account beside it: `specs` and `cells` by slot, and `held`, the bytes of all
    cells together."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: dict[int, Tag] = {}
        self.specs: dict[int, Spec] = {}
        self.cells: dict[int, Cell] = {}
        self.lent: dict[int, torch.Tensor] = {}  # by address of its storage, which is kept: addresses come again
        self.held = 0
        self.private = False  # whether anything here ever had a label
        self.drawn = PUBLIC  # what the state of the random generator derives from
        self.unseeded = False  # whether private elements may have decided how far that has gone on
        self.astray = False  # whether anything here was drawn from it then
        self.bindings: dict[int, int] = {}  # slot -> number of its binding, once there is private data: ids come again
        self.turned_away: tuple[int, Exception] | None = None  # the first id that found no room, and why
        self._by_address: dict[int, Cell] = {}
        self._bindings = 0

    def __missing__(self, ref: int) -> Any:
        if self.turned_away is not None and ref >= self.turned_away[0]:
            raise self.turned_away[1]
        raise Missing(f"no slot {ref} in this session: it was dropped, or belongs to another worker or session")

    # -- the account --------------------------------------------------------------------------------------

    def count(self, ref: int, value: torch.Tensor, expected: Spec | None = None) -> None:
        """A slot was bound: charge its storage, unless another slot has. `expected` is the type it should have."""
        address = address_of(value)
        cell = self._by_address.get(address)
        if cell is None:
            nbytes = value.untyped_storage().nbytes()
            cell = self._by_address[address] = Cell(address, nbytes)
            self.held += nbytes
        cell.slots += 1
        self.cells[ref] = cell
        if self.private:
            self._number(ref)
        if expected is None or value.shape != expected.size or value.dtype is not expected.dtype:
            expected = spec_of(value)
        self.specs[ref] = expected

    def lend(self, ref: int, value: torch.Tensor, label: Label) -> None:
        """Bind a slot to a tensor of the owner's: charged to nobody, and neither it nor a view may be written."""
        address = address_of(value)
        self.lent[address] = value
        if address not in self._by_address:
            self._by_address[address] = Cell(address, 0)
        self[ref] = value
        self.count(ref, value)
        self.mark((ref,), label, failed=False)

    # -- labels -------------------------------------------------------------------------------------------

    def label(self, ref: int) -> Label:
        """From which owned data sets a slot's value derives."""
        cell = self.cells.get(ref)
        return PUBLIC if cell is None else cell.label

    def read_by(self, call: Call) -> tuple[Label, bool]:
        """The label of all that a call reads, and whether any of it failed on private data."""
        label, failed, cells = PUBLIC, False, self.cells
        for arg in (*call.args, *call.kwargs.values()):
            for ref in (arg.id,) if type(arg) is Ref else refs(arg) if type(arg) is Items else ():
                cell = cells.get(ref)
                if cell is not None and cell.label:
                    label, failed = label | cell.label, failed or cell.failed
        if self.drawn and operator(call.op).random:
            label = label | self.drawn
        return label, failed

    def mark(self, slots: Iterable[int], label: Label, *, failed: bool) -> None:
        """What these slots hold, and all that shares their storage, derives from `label` as well."""
        if not self.private:
            self.private = True
            for ref in self.cells:
                self._number(ref)
        for ref in slots:
            cell = self.cells.get(ref)
            if cell is not None:
                cell.label = cell.label | label
                cell.failed = cell.failed or failed

    def drew(self, draws: Draws) -> None:
        """Calls on private data have drawn random numbers. See `private.UNSEEDED`."""
        self.astray |= bool(draws.calls) and (self.unseeded or (draws.by_elements and draws.calls > 1))
        self.unseeded |= draws.by_elements

    def seeded(self) -> None:
        """The generator begins with a state of the scientist's."""
        self.drawn, self.unseeded = PUBLIC, False

    def _number(self, ref: int) -> None:
        self._bindings += 1
        self.bindings[ref] = self._bindings

    def write(self, call: Call) -> None:
        """Before a call writes: refuse it for what the owner lends, or a view of it (`ProgramError`), and count it,
        also if it fails halfway: the values of this storage are others from now on."""
        for name, ref in writes(call):
            cell = self.cells.get(ref)
            if cell is not None and cell.address in self.lent:
                raise ProgramError(f"'{name}' is the owner's data, which is there to be read; clone it first")
            if cell is not None:
                cell.writes += 1

    def drop(self, ref: int) -> None:
        """Free a slot, and its storage's charge if it was the last. Dropping what is not there changes nothing."""
        self.pop(ref, None)
        if self.tags:
            self.tags.pop(ref, None)
        cell = self.cells.pop(ref, None)
        if cell is not None:
            del self.specs[ref]
            self.bindings.pop(ref, None)
            cell.slots -= 1
            if not cell.slots:
                del self._by_address[cell.address]
                self.held -= cell.nbytes

    def clear(self) -> None:
        """Free every slot."""
        super().clear()
        self.tags.clear()
        self.specs.clear()
        self.cells.clear()
        self.lent.clear()
        self.bindings.clear()
        self._by_address.clear()
        self.held = 0
        self.astray = False
        self.private = bool(self.drawn)  # the generator goes on from where private data has brought it
        self.turned_away = None

    # -- what others ask ----------------------------------------------------------------------------------

    def tensors(self) -> dict[int, torch.Tensor]:
        """The values, without the failures."""
        return {ref: value for ref, value in self.items() if isinstance(value, torch.Tensor)}

    def search(self, tags: tuple[str, ...], types: Any) -> tuple[Info, ...]:
        """The tagged slots that carry all of `tags`, in order of tagging; `types(value)` gives their types."""
        self.tags = {ref: tag for ref, tag in self.tags.items() if ref in self}
        return tuple(
            Info(ref, types(self[ref]), tag.tags, tag.description)
            for ref, tag in self.tags.items()
            if set(tags) <= set(tag.tags) and isinstance(self[ref], torch.Tensor)
        )
