"""A slot: the one object here that stands for a value at a worker.

NOTE [Lifetimes]
A `Slot` is the one object that stands for a value at the worker; pointers that alias it (`detach`) share it. When the
last of them dies, from whichever thread, also the garbage collector's, also at exit, its mark is appended to `dropped`:
by a weak reference's callback in C, which is atomic, needs no lock, and swallows no Ctrl-C, as a `__del__` would. What
was issued before may use it, so its `Drop` stands behind that. Marks are of slots and not of tensors, since modules
swap what a tensor object holds.
A result of the present trace has no mark yet: most die within it, and are not bound at all. A trace refers to its
results weakly; those that live when it ends get their marks.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import msgspec

from ..program.outcome import Spec
from ..types import TensorType

if TYPE_CHECKING:
    from .session import Session
    from .trace import Trace

__all__ = ["Mark", "Slot"]


class Mark(weakref.ref["Slot"]):
    """What is left of a slot that died: its id. See NOTE [Lifetimes]."""

    __slots__ = ("id",)
    id: int


class Slot:
    """One value at a worker. Dies with the last pointer to it, and frees the value then.

    `register` is its place in `trace`, while that is its session's present one: a `trace` that is given makes it a
    result of its own; later ones have `taken` it as an input. `spec` is its type at the start of a storage, `skip` how
    many bytes of its storage come before it: so batches that are views of one column are alike."""

    __slots__ = ("__weakref__", "id", "register", "session", "skip", "spec", "taken", "trace")

    def __init__(self, session: Session, spec: Spec, trace: Trace | None = None, skip: int = 0) -> None:
        self.session, self.spec, self.trace, self.skip = session, spec.start, trace, skip + spec.skip
        self.id = next(session.ids)
        self.taken = False
        if trace is None:
            self.mark()
        else:
            self.register = trace.make(self)

    def mark(self) -> None:
        """From now on its end is noticed: see NOTE [Lifetimes]."""
        session, ref = self.session, self.id
        mark = session.marks[ref] = Mark(self, session.drop)
        mark.id = ref

    @property
    def type(self) -> TensorType:
        """Its type where it lies."""
        return msgspec.structs.replace(self.spec.type, offset=self.skip // self.spec.dtype.itemsize)
