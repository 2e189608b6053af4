"""Pointers of modules that came home, kept for the next that leave: to make a tensor costs more than all else that a
parameter's way to a worker does here.

What is kept points nowhere and has no gradient. A graph may still refer to it: then it is left alone until it does not.
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

_ALIKE = 32  # that are kept, the latest ones; and of how many types
_TYPES = 1 << 10

_kept: dict[tuple[Spec, bool], deque[Any]] = {}


def keep(spare: Any, spec: Spec, requires_grad: bool) -> None:
    """Keep a pointer to a value of this type at the start of a storage, a leaf, for which nobody looks any more."""
    if spare.is_inference():
        return
    alike = _kept.get((spec, requires_grad))
    if alike is None:
        if len(_kept) >= _TYPES:
            _kept.clear()
        alike = _kept[spec, requires_grad] = deque(maxlen=_ALIKE)
    alike.append(spare)


def pointer(cls: Any, slot: Slot, requires_grad: bool) -> Any:
    """A pointer to a slot, a leaf: one that was kept, or a new one."""
    alike = _kept.get((slot.spec, requires_grad))
    if alike and not slot.skip and not torch.is_inference_mode_enabled():
        try:
            found = alike.popleft()
        except IndexError:  # another thread took it
            found = None
        # Counted: `found` here, and getrefcount's own argument; by torch, Python's object. A graph would be one more.
        if found is not None and sys.getrefcount(found) == 2 and found._use_count() == 1:
            found._slot = slot
            found._backward_hooks = None  # see `module`: _watch
            return found
        if found is not None:
            alike.appendleft(found)
    made = point(cls, slot)
    return made.requires_grad_() if requires_grad else made
