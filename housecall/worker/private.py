"""Calls on private data: what a session may see of them before the owner's door has been asked, which is nothing.

NOTE [What a caller sees of a private call]
That it was issued, which she knows. Whether it *failed* would already tell something of the data (an index out of
range, a matrix that is not positive definite), so it is not told: the results are zeros of the types that they would
have had, their cells are marked as failed, and so is all that derives from them. Only a release that the policy allows
says so, in one constant sentence; the owner's log has the details. Types never depend on private elements: operators
whose results' shapes do are refused, by name, whatever the elements are. What is left is time: a call takes as long
as it takes.
"""

from __future__ import annotations

import logging

import torch

from ..errors import ProgramError
from ..program.call import HOLE, Call, refs
from ..program.forecast import result_types, shown_by_shape
from ..program.ops import operator
from ..program.outcome import Spec
from ..program.run import Randomness, arguments_of, execute
from ..program.trust import check_values, trusts_values
from ..types import Label
from .history import History
from .store import Store, writes

__all__ = ["FAILED", "check_private", "note_failure", "run_private", "zeros"]

FAILED = "a call that this value derives from failed on private data; the details are in the owner's log"

log = logging.getLogger(__name__)


def check_private(call: Call, label: Label, store: Store) -> None:
    """Refuse a call whose results' shapes would tell of private elements. Raises `ProgramError`; reads no element."""
    if shown_by_shape(call, store):
        raise ProgramError(
            f"{call.op} on data of the worker's owner ({label}) was refused: the shape of what it gives depends on "
            "elements. Say what you need with a fixed shape (`where` and a sum, in place of a mask and an index)"
        )


def run_private(call: Call, label: Label, failed: bool, store: Store, randomness: Randomness, history: History) -> None:
    """Run a call whose arguments have a label, and label what it gives and writes. Raises nothing."""
    written = [ref for _, ref in writes(call)]
    read = [ref for arg in (*call.args, *call.kwargs.values()) for ref in refs(arg)]
    if operator(call.op).random:  # how much it drew may depend on elements
        store.drawn = store.drawn | label
    try:
        if trusts_values(call.op):
            check_values(call.op, arguments_of(call, store))
        execute(call, store, randomness)
    except Exception as error:  # whatever it is, it stays here
        note_failure(call, label, error)
        failed = True
        _stand_in(call, store)
    for out in call.outs:
        if out in store:  # else a hole
            store.count(out, store[out])
    store.pop(HOLE, None)
    store.mark((*call.outs, *written), label, failed=failed)
    history.add(call, {ref: store.specs[ref].type for ref in read}, store.cells, written)


def _stand_in(call: Call, store: Store) -> None:
    """Zeros of the types that the results would have had."""
    for out, given in zip(call.outs, result_types(call, store), strict=False):
        if out != HOLE and given is not None:
            store[out] = zeros(given)


def note_failure(call: Call, label: Label, error: Exception) -> None:
    """Say in the owner's log that a call failed on private data. Nobody else is told."""
    log.warning("%s failed on private data (%s): %s: %s", call.op, label, type(error).__name__, error)


def zeros(given: Spec) -> torch.Tensor:
    """What stands in the place of a result that could not be had."""
    return torch.empty_strided(given.size, given.stride, dtype=given.dtype).zero_()
