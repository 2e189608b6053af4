"""A tape: a session that reaches no worker. What is issued to its pointers stays on it; `record` makes a program of it.

There are no values behind its pointers. Whatever needs one (`.item()`, `bool()`, a shape that depends on elements,
`.get()`) is refused at the line where it stands.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, NoReturn

import torch

from ..errors import UsageError
from ..program.call import Call
from ..program.outcome import spec
from ..types import TensorType
from ..wire.messages import Message, Result
from .calls import Rule, issue, point
from .optimizer import stepping
from .session import Session
from .site import Site, caller
from .slot import Slot
from .tensor import PointerTensor

__all__ = ["Tape"]


_FULL = Rule(torch.ops.aten.full.default)


class _Nowhere:
    """The transport of a tape: nothing leaves."""

    frame_messages = sys.maxsize
    frame_bytes = 1 << 62
    remote = False

    def send(self, frame: Any) -> None:
        """Never called: a tape does not flush."""

    def start(self) -> None:
        """Nothing is under way."""

    def wait(self) -> None:
        """Never called: a tape does not wait."""

    def receive(self) -> Any:
        """Never called, as well."""

    def close(self) -> None:
        """Nothing is open."""


class _Stage:
    """The location of a tape's pointers, as they print it."""

    id = "recording"

    def __str__(self) -> str:
        return self.id


class Tape(Session):
    """Calls without a worker. `stand_in` gives a pointer of a type, `calls` what was done with them."""

    def __init__(self) -> None:
        super().__init__(_Nowhere(), _Stage())
        self.guarded = True  # its program may run anywhere
        Session.live.discard(self)  # nobody who waits need start it

    def stand_in(self, type_: TensorType) -> PointerTensor:
        """A pointer of this type with nothing behind it: an input."""
        pointer: PointerTensor = point(PointerTensor, Slot(self, spec(type_)))
        return pointer

    def calls(self) -> list[Call]:
        """What was issued, in order, over ids of the tape."""
        return self.trace.calls()

    def put(self, tensor: torch.Tensor, site: Site | None = None) -> Slot:
        """A local number becomes a constant of the program; a local tensor with dimensions is refused."""
        if tensor.dim():
            raise UsageError(
                f"a local tensor of shape {tuple(tensor.shape)} cannot be recorded, at {caller()}. Make it an argument "
                "of the function, so that it becomes an input of the program"
            )
        named = {"dtype": tensor.dtype, "device": torch.device("cpu")}
        pointer: PointerTensor = issue(PointerTensor, _FULL, self, ((), tensor.item()), named)
        return pointer._slot

    def seed(self) -> None:
        """The worker's generator is told when the program runs."""

    def flush(self) -> None:
        """Nothing leaves."""

    def wait(self) -> NoReturn:
        """Refused."""
        self._refuse("a wait for the worker")

    def tell(self, message: Message, site: Any = None) -> NoReturn:
        """Refused."""
        self._refuse(f"a {type(message).__name__.lower()}")

    def ask(self, message: Message) -> Result:
        """Refused."""
        self._refuse(f"a {type(message).__name__.lower()}")

    def fetch(self, slots: Iterable[Slot]) -> NoReturn:
        """Refused."""
        self._refuse("a value (`.item()`, `bool()`, `.get()`, a branch that depends on one)")

    def types_of(self, call: Call, slots: list[Slot]) -> NoReturn:
        """Refused."""
        self._refuse(f"a shape that depends on values (`{call.op.partition('.')[0]}`)")

    def describe(self, slots: Iterable[Slot]) -> NoReturn:
        """Refused."""
        self._refuse("a shape")

    def _refuse(self, what: str) -> NoReturn:
        stepped = stepping()
        if stepped is not None:
            raise UsageError(
                f"the step of {type(stepped).__name__} cannot be recorded, at {caller()}: it needs {what}, and there "
                "are no values while a program is recorded. Call its step() outside of the function, after the run, or "
                "take another optimizer"
            )
        raise UsageError(
            f"{what} cannot be had while a program is recorded, since there are no values: at {caller()}. Say it with "
            "operators (`torch.where` in place of a branch), or do it after the run, with what the function returns"
        )
