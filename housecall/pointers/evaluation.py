"""Mean scores of a model over an owner's data, made by her own loop: `dataset.evaluate(score, model, "x", "y", ...)`.

What must live here: how a function and its arguments become a score that an owner's worker can run, record by record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from rich.console import Console

from ..errors import PlaceError, UsageError
from ..program.call import Program
from ..program.typing import DTYPES
from ..wire.messages import Column, Define, Evaluate, Noised, Owned, Requested, Result
from .record import Recorded
from .request import OwnersAnswer, ask_gate, check_asked
from .session import Session
from .slot import Slot
from .statistics import StatisticsAnswer
from .tensor import PointerTensor

__all__ = ["Scored", "ask_score", "submit_score"]

Bounds = tuple[float, float]
_MANY = 2_000  # records: with fewer nobody waits long enough to read it


class Scored(NamedTuple):
    """A score of one record: its function, or recording, what that is given (a column by its name), and its bounds."""

    score: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    bounds: Any


def ask_score(session: Session, owned: Owned, what: Scored) -> StatisticsAnswer:
    """Ask, and wait. Raises `UsageError` for what is no score, `PolicyError` if the owner's rules say no."""
    with _waiting(f"'{session.location.id}' scores {owned.count:,} records, one by one", owned.count):
        found = _asked(session, owned, what)
    assert isinstance(found, Noised)
    return StatisticsAnswer(found.values[0], found.scale, found.epsilon, found.left)


def submit_score(session: Session, owned: Owned, what: Scored, reason: str, runs: int) -> OwnersAnswer:
    """Ask the owner to let it be made. Raises as `ask_score` does."""
    check_asked(reason, runs)
    said = _asked(session, owned, what, reason, runs)
    assert isinstance(said, Requested)
    return OwnersAnswer(session, said)


def _asked(session: Session, owned: Owned, what: Scored, *asking: Any) -> Result:
    program, inputs, _kept = _bound(session, owned, what)
    session.tell(Define(program))
    return ask_gate(session, Evaluate(owned.name, program.digest, inputs, _pair(what.bounds), *asking), "evaluate")


def _waiting(what: str, count: int) -> AbstractContextManager[Any]:
    """A line that says so, where it takes a while."""
    return Console(stderr=True).status(what) if count >= _MANY else nullcontext()


def _pair(bounds: Any) -> Bounds:
    try:
        low, high = map(float, bounds)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"the bounds of a score are two numbers, bounds=(0, 1); found {bounds!r}") from None
    return low, high


def _bound(session: Session, owned: Owned, what: Scored) -> tuple[Program, tuple[int | str, ...], list[Slot]]:
    """The program, its inputs, and the slots that must live as long as they are named: what is here is sent along."""
    recorded = what.score if isinstance(what.score, Recorded) else Recorded(what.score)
    columns = {column.name: column for column in owned.columns}
    names: dict[int, str] = {}

    def example(arg: Any) -> Any:
        if not isinstance(arg, str):
            return arg
        made = _record(owned, columns, arg)
        names[id(made)] = arg
        return made

    examples = [example(arg) for arg in what.args], {name: example(arg) for name, arg in what.kwargs.items()}
    with torch.no_grad():
        program, tensors = recorded.bound(*examples[0], **examples[1])
    slots = [None if id(tensor) in names else _slot(session, tensor) for tensor in tensors]
    inputs = [names[id(tensor)] if slot is None else slot.id for tensor, slot in zip(tensors, slots, strict=True)]
    return program, tuple(inputs), [slot for slot in slots if slot is not None]


def _record(owned: Owned, columns: Mapping[str, Column], name: str) -> torch.Tensor:
    """One record of a column, without elements: (1, ...)."""
    if name not in columns:
        raise UsageError(f"'{owned.name}' has no column {name!r}; it has {', '.join(columns)}")
    return torch.empty((1, *columns[name].shape), dtype=DTYPES[columns[name].dtype], device="meta")


def _slot(session: Session, tensor: torch.Tensor) -> Slot:
    if not isinstance(tensor, PointerTensor):
        return session.put(tensor.detach(), None)
    if tensor._slot.session is not session:
        raise PlaceError(
            f"a score runs at '{session.location.id}', and one of its tensors is at '{tensor.location.id}': .get() it"
        )
    return tensor._slot
