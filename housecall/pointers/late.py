"""Gradients that come home late: with the module they only come by name, and by value when somebody looks.

`model.get()` brings parameters and buffers. Their gradients are often dropped unseen, by the `zero_grad` of the next
batch, and are as large as the parameters. So each stays where it is, behind a `LateTensor`: a tensor of the same shape
that fetches its value, and those of its fellows from the same visit, when any operation or method first needs one.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from ..errors import PolicyError
from ..program.outcome import Spec
from ..wire.messages import Failure
from .aside import plainly
from .session import Session
from .slot import Slot

__all__ = ["LateTensor", "Visit", "at_hand"]

_make: Any = torch.Tensor._make_wrapper_subclass


class Visit:
    """What one `model.get()` left at one worker."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._left: list[weakref.ref[LateTensor]] = []
        session.leaves(self)

    def leave(self, slot: Slot) -> LateTensor:
        """A tensor for the value of this slot, which stays at the worker for now."""
        given: Spec = slot.spec
        late: LateTensor = _make(LateTensor, *given.wrapper)
        late._visit, late._slot = self, slot
        self._left.append(weakref.ref(late))
        return late

    def take(self, pointer: Any) -> LateTensor:
        """The same, for a pointer that nobody else has: it is that tensor from now on."""
        pointer.__class__ = LateTensor
        pointer._visit = self
        self._left.append(weakref.ref(pointer))
        return pointer  # type: ignore[no-any-return]  # it was another

    def bring(self) -> None:
        """Fetch all that somebody still holds, in one round trip; one by one if not all may leave. Raises
        `OperatorError`, `PolicyError` or `WorkerGone`; what was left stays so, and can be asked for again."""
        held = [ref() for ref in self._left]
        waiting = [late for late in held if type(late) is LateTensor and late._slot is not None]  # some went back
        if not waiting:
            return
        trouble = self._brought(waiting)
        if trouble is not None:
            for late in waiting if len(waiting) > 1 else ():
                if late._slot is not None:
                    self._brought([late])
            raise trouble
        self._left.clear()

    def _brought(self, waiting: list[LateTensor]) -> Exception | None:
        """Fetch these; the first failure, if there is one. What came is kept: an approval may be used up for it."""
        session = self._session
        values, trouble = session.bring([late._slot for late in waiting if late._slot is not None])
        failure: Exception | None = trouble
        for late, value in zip(waiting, values, strict=True):
            if isinstance(value, Failure):
                failure = failure or session.error(value)
            else:
                late._value, late._slot = value, None
        return failure


class LateTensor(torch.Tensor):
    """A gradient at home whose value is still at the worker. `slot` is where, `None` once it has come."""

    _visit: Visit
    _slot: Slot | None
    _value: torch.Tensor | None = None

    @property
    def slot(self) -> Slot | None:
        """Where the value still is."""
        return self._slot

    def back(self, cls: Any) -> Any:
        """A pointer to its value, which is still at the worker. Nobody else has this tensor: it is that from now on. To
        be called within `plainly()`."""
        del self._visit
        self.__class__ = cls
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SHAPE:
            with plainly():
                return func(*args, **(kwargs or {}))
        return func(*_plain(args), **_plain(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # torch types its own as a stub
        result = func(*_plain(args), **_plain(kwargs or {}))
        written = [arg for arg in args if isinstance(arg, LateTensor) and arg._value is result]
        return written[0] if written else result  # who writes in place expects what she wrote to


def at_hand(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself; for one that is late, its value, which is fetched now."""
    if not isinstance(tensor, LateTensor):
        return tensor
    if tensor._value is None:
        try:
            tensor._visit.bring()
        except PolicyError:
            if tensor._value is None:  # else it came, and another may not
                raise
    assert tensor._value is not None
    return tensor._value


def _plain(given: Any) -> Any:
    if isinstance(given, LateTensor):
        return at_hand(given)
    if isinstance(given, list | tuple):
        return type(given)(map(_plain, given)) if type(given) in (list, tuple) else given
    if isinstance(given, dict):
        return {name: _plain(value) for name, value in given.items()}
    return given


# What torch knows of it without its value.
_PROPERTIES: tuple[Any, ...] = (
    torch.Tensor.shape, torch.Tensor.dtype, torch.Tensor.device, torch.Tensor.layout, torch.Tensor.requires_grad,
    torch.Tensor.is_leaf, torch.Tensor.grad_fn, torch.Tensor.ndim,
)  # fmt: skip
_SHAPE = frozenset(
    {
        *(known.__get__ for known in _PROPERTIES),
        torch.Tensor.size,
        torch.Tensor.stride,
        torch.Tensor.dim,
        torch.Tensor.numel,
        torch.Tensor.nelement,
        torch.Tensor.element_size,
        torch.Tensor.is_floating_point,
        torch.Tensor.is_complex,
        torch.Tensor.is_contiguous,
        torch.Tensor.__len__,
        torch.Tensor.__hash__,
    }
)
