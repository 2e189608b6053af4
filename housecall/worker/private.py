"""Calls on private data: what a session may see of them before the owner's door has been asked, which is nothing.

NOTE [What a caller sees of a private call]
That it was issued, which she knows. Whether it *failed* would already tell something of the data (an index out of
range, a matrix that is not positive definite), so it is not told: the results are zeros of the types that they would
have had, their cells are marked as failed, and so is all that derives from them. Only a release that the policy allows
says so, in one constant sentence; the owner's log has the details.

Types never depend on private elements: operators whose results' shapes do are refused, by name, whatever the elements
are. And what a result is in memory (strides, the size of its storage, whether it has one of its own) is what was
forecast from the types of the arguments: a kernel that gives it otherwise has its result laid out anew, since a session
can learn these by asking, or by how near it is to its limits. What is left is time: a call takes as long as it takes.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import torch

from ..errors import ProgramError
from ..program.call import HOLE, Call, Program, refs
from ..program.forecast import Made, shown_by_shape
from ..program.ops import operator
from ..program.run import Randomness, arguments_of, execute
from ..program.trust import check_values, trusts_values
from ..program.typing import address_of
from ..types import Label
from .history import History
from .store import Draws, Store, writes

__all__ = [
    "FAILED",
    "UNSEEDED",
    "blank",
    "check_made",
    "check_private",
    "draws_of",
    "note_failure",
    "run_private",
    "settled",
]

FAILED = "a call that this value derives from failed on private data; the details are in the owner's log"

UNSEEDED = (
    "the random numbers of this session go on from where a call on private data has brought them (how many it drew "
    "depends on elements), which no owner reads in a program: seed first, with torch.manual_seed(...), which sends a "
    "new state before the next random call"
)

# Of the random operators that read a tensor, those that draw as much as its shape says, whatever its elements are.
_BY_SHAPE = frozenset(
    {
        "bernoulli.p",
        "bernoulli_.float",
        "native_dropout.default",
        "normal_.default",
        "rand_like.default",
        "randint_like.default",
        "randint_like.low_dtype",
        "randn_like.default",
        "uniform.default",
        "uniform_.default",
    }
)

log = logging.getLogger(__name__)


def check_private(call: Call, label: Label, store: Store) -> None:
    """Refuse a call whose results' shapes would tell of private elements. Raises `ProgramError`; reads no element."""
    if shown_by_shape(call, store):
        raise ProgramError(
            f"{call.op} on data of the worker's owner ({label}) was refused: the shape of what it gives depends on "
            "elements. Say what you need with a fixed shape (`where` and a sum, in place of a mask and an index)"
        )


def check_made(call: Call, label: Label, made: tuple[Made | None, ...] | None) -> None:
    """Refuse a call whose results could not be typed before it runs. Raises `ProgramError`."""
    if made is None and call.outs:
        raise ProgramError(
            f"{call.op} on data of the worker's owner ({label}) was refused: what it gives is not known before it runs"
        )


def draws_of(program: Program) -> Draws:
    """What a program draws."""
    ops = [call.op for call in program.calls if operator(call.op).random]
    return Draws(len(ops), not _BY_SHAPE.issuperset(ops))


def run_private(
    call: Call,
    made: tuple[Made | None, ...],
    label: Label,
    failed: bool,
    store: Store,
    randomness: Randomness,
    history: History,
) -> None:
    """Run a call whose arguments have a label, and label what it gives and writes. `made` is what it was forecast to
    give. Raises nothing that depends on elements."""
    written = [ref for _, ref in writes(call)]
    read = [ref for arg in (*call.args, *call.kwargs.values()) for ref in refs(arg)]
    if operator(call.op).random:
        store.drawn = store.drawn | label
        store.drew(Draws(1, call.op not in _BY_SHAPE))
    store.mark(written, label, failed=failed)  # before it begins: what fails halfway has written, too
    taken = {address_of(store[ref]) for ref in read}
    results = _Beside(store)
    try:
        if trusts_values(call.op):
            check_values(call.op, arguments_of(call, store))
        execute(call, results, randomness)
    except Exception as error:  # whatever it is, it stays here
        note_failure(call, label, error)
        failed = True
    device = next((store[ref].device for ref in read), torch.device("cpu"))
    for out, one in zip(call.outs, made, strict=False):
        if out != HOLE and one is not None:
            value = store[out] = settled(results.get(out), one, taken, device)
            store.count(out, value, one.spec)
    store.mark((*call.outs, *written), label, failed=failed)
    history.add(call, read, written, store)


class _Beside(dict[int, Any]):
    """Reads from a store, binds beside it: a call that fails halfway has bound nothing there."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store

    def __missing__(self, ref: int) -> Any:
        return self._store[ref]


def settled(value: Any, made: Made, taken: set[Any], device: torch.device) -> torch.Tensor:
    """A result as it was forecast: as the kernel gave it where it is just that, laid out anew where not, and zeros
    where there is none (`None`). `taken` are the addresses of storages that are somebody's; this one's is added."""
    given = value if isinstance(value, torch.Tensor) else blank(made, device)
    if made.fresh and not _is_as(given, made, taken):
        given = _laid_out(given, made)
    taken.add(address_of(given))
    return given


def _is_as(value: torch.Tensor, made: Made, taken: Collection[Any]) -> bool:
    type_ = made.spec.type
    return (
        value.stride() == type_.stride
        and value.shape == made.spec.size
        and value.dtype is made.spec.dtype
        and value.storage_offset() == type_.offset
        and (value.is_conj(), value.is_neg()) == (type_.conj, type_.neg)
        and value.untyped_storage().nbytes() == made.nbytes
        and address_of(value) not in taken
    )


def _laid_out(value: torch.Tensor, made: Made) -> torch.Tensor:
    """A result with the strides and the storage of its forecast; zeros if it has not even its shape, as the statistics
    of a `native_batch_norm` that evaluates have not, which nobody reads."""
    copy: torch.Tensor = blank(made, value.device)
    return copy.copy_(value) if value.shape == copy.shape and value.dtype is copy.dtype else copy


def blank(made: Made, device: torch.device) -> torch.Tensor:
    """Zeros of a type, in a storage of that size."""
    spec = made.spec
    room = torch.zeros(made.nbytes // spec.dtype.itemsize, dtype=spec.dtype, device=device)
    given: torch.Tensor = room.as_strided(spec.size, spec.stride, spec.offset)
    return given


def note_failure(call: Call, label: Label, error: Exception) -> None:
    """Say in the owner's log that a call failed on private data. Nobody else is told."""
    log.warning("%s failed on private data (%s): %s: %s", call.op, label, type(error).__name__, error)
