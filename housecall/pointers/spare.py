"""Pointers of modules that came home, kept for the next that leave: to make a tensor costs more than all else that a
parameter's way to a worker does here.

NOTE [Nothing is left]
What is kept points nowhere, has no gradient, and must be as a new pointer would be to whoever gets it. So it is kept
only if it is a leaf at the start of a storage, with torch's own settings, and alone: another pointer to its slot is an
alias (`detach`, `.data`), with which it shares its version counter. And it is used only if no graph refers to it.
"""

from __future__ import annotations

import sys
from collections import deque
from typing import Any

import torch

from ..program.outcome import Spec
from .repeat import point
from .slot import Slot

__all__ = ["keep", "pointer"]

_ALIKE = 32  # of one type that are kept: the latest
_TYPES = 1 << 10  # beyond, all are let go

_kept: dict[tuple[Spec, bool], deque[Any]] = {}


def _alone() -> int:
    """What is counted of an object that a caller and who is called have in one variable each: not the same in every
    Python."""

    def called(spare: Any, slot: Any) -> int:
        return sys.getrefcount(slot)

    slot = object()
    return called(None, slot)


_ALONE = _alone()


def keep(spare: Any, slot: Slot) -> None:
    """Keep a pointer that nobody looks for any more. `slot` is what it pointed to, and the caller has it in one
    variable."""
    given = slot.spec
    if slot.skip or sys.getrefcount(slot) > _ALONE or not spare.is_leaf or spare.is_inference():
        return
    if spare.grad_dtype is not given.dtype:
        return
    spare.grad = None
    key = given, spare.requires_grad
    alike = _kept.get(key)
    if alike is None:
        if len(_kept) >= _TYPES:
            _kept.clear()
        alike = _kept[key] = deque(maxlen=_ALIKE)
    alike.append(spare)


def pointer(cls: Any, slot: Slot, requires_grad: bool) -> Any:
    """A pointer to a slot, a leaf: one that was kept, or a new one."""
    alike = _kept.get((slot.spec, requires_grad))
    if alike and not slot.skip and not torch.is_inference_mode_enabled():
        try:
            found = alike.popleft()
        except IndexError:  # another thread took it
            return _made(cls, slot, requires_grad)
        # Counted: `found` here, and getrefcount's own argument; by torch, Python's object. A graph would be one more.
        if sys.getrefcount(found) == 2 and found._use_count() == 1:
            found._slot = slot
            found._backward_hooks = None  # those of `module`, for graphs that are gone
            return found
        alike.append(found)
    return _made(cls, slot, requires_grad)


def _made(cls: Any, slot: Slot, requires_grad: bool) -> Any:
    made = point(cls, slot)
    return made.requires_grad_() if requires_grad else made
