"""An optimizer's state follows its parameters, before each step and only if it must.

torch calls a hook before every `step` of every optimizer (`register_optimizer_step_pre_hook`, its own public
point). Ours looks whether a parameter's gradient and state (momentum, moments ...) are where the parameter is,
and brings what is not: in one round trip for each worker that is left. State without dimensions that is local
(`step` counters) stays local: optimizers read it as a number. Only Adagrad's fused kernel counts by itself.

NOTE [A step that was not taken]
After a failure a worker changes nothing until its caller has heard (`worker.store`: After a failure). So the step that
followed a bad batch changed no parameter and no moment there; but here it counted, and may have begun state of
gradients that were never there. If a write of the very line that stepped was not done, that is undone before the next
step: a bad batch is as if it had not been, as it is in plain torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ..errors import UsageError
from .aside import plainly
from .session import Session
from .site import Site, Spot, caller, caller_again, is_callers
from .tensor import PointerTensor, send

__all__ = ["check_recordable", "follow", "get_state", "stepping"]

Place = Session | None
Setter = Callable[[torch.Tensor], None]


class _Step(NamedTuple):
    """What an optimizer kept before its last step, that line, and how much each session had told of by then."""

    site: Site | None
    kept: list[tuple[torch.Tensor, dict[str, Any]]]
    told: dict[Session, int]


_STEPPING = Spot()
_LAST = "_housecall_last_step"  # where an optimizer has it; what is saved of one has no such attribute


def follow(optimizer: torch.optim.Optimizer, args: Any = (), kwargs: Any = None) -> None:
    """Bring gradients and state to their parameters; what is there already costs nothing."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    places = {p._slot.session for p in parameters if type(p) is PointerTensor}
    _undo(optimizer)
    if not optimizer.state and not _stray_gradients(parameters):
        _remember(optimizer, places, [(p, {}) for p in parameters])
        return
    strays = [
        stray
        for group in optimizer.param_groups
        for p in group["params"]
        for stray in _strays(optimizer, p, counters=_counts(optimizer, group))
    ]
    for session in {_place(tensor) for tensor, _, _ in strays}:
        leaving = [stray for stray in strays if _place(stray[0]) is session]
        tensors = [tensor for tensor, _, _ in leaving]
        values = tensors if session is None else session.fetch([tensor._slot for tensor in tensors])  # type: ignore[attr-defined]  # those with a session are pointers
        for value, (_, target, put) in zip(values, leaving, strict=True):
            put(value if target is None else send(value.detach(), target.location))
    _remember(optimizer, places, [(p, _copied(optimizer.state.get(p, {}))) for p in parameters])


def _stray_gradients(parameters: list[torch.Tensor]) -> bool:
    """Whether any gradient is elsewhere than its parameter."""
    with plainly():
        for parameter in parameters:
            grad = parameter.grad
            if grad is None or (
                type(grad) is PointerTensor is type(parameter) and grad._slot.session is parameter._slot.session
            ):
                continue
            if _place(grad) is not _place(parameter):
                return True
    return False


def _remember(
    optimizer: torch.optim.Optimizer, places: set[Session], kept: list[tuple[torch.Tensor, dict[str, Any]]]
) -> None:
    """What an optimizer keeps before a step that is taken at these places."""
    if places:
        told = {session: session.failures for session in places}
        optimizer.__dict__[_LAST] = _Step(caller_again(_STEPPING), kept, told)


def get_state(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Bring an optimizer's state home, so that it can be saved; one round trip for each worker. Returns the optimizer.

    Where its parameters are does not matter; before the next step the state follows them again."""
    found = [
        (value, holder, key)
        for state in optimizer.state.values()
        for holder, key, value in _entries(state)
        if isinstance(value, PointerTensor)
    ]
    for session in {value._slot.session for value, _, _ in found}:
        here = [entry for entry in found if entry[0]._slot.session is session]
        for home, (_, holder, key) in zip(session.fetch([value._slot for value, _, _ in here]), here, strict=True):
            holder[key] = home
    return optimizer


def check_recordable(optimizer: torch.optim.Optimizer) -> None:
    """Raise `UsageError` for an optimizer whose step no program can say."""
    if any(_counts(optimizer, group) for group in optimizer.param_groups):
        raise UsageError(
            f"the step of {type(optimizer).__name__} with fused=True cannot be recorded, at {caller()}: its kernel "
            "counts the steps by itself. Make the optimizer with fused=False, which does the same"
        )


def stepping() -> torch.optim.Optimizer | None:
    """The optimizer whose step the caller's own code is calling just now."""
    frame = sys._getframe(1)
    while frame is not None and not is_callers(frame.f_code.co_filename):
        found = frame.f_locals.get("self") if frame.f_code.co_name == "step" else None
        if isinstance(found, torch.optim.Optimizer):
            return found
        frame = frame.f_back  # type: ignore[assignment]  # as long as there is one
    return None


def _counts(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether the kernel of a step counts, so that the counters must be where the parameters are."""
    return isinstance(optimizer, torch.optim.Adagrad) and bool(group["fused"])


def _entries(holder: Any) -> Iterator[tuple[Any, Any, torch.Tensor]]:
    """The tensors that an optimizer keeps of one parameter, with what holds each, and under which key."""
    for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
        if isinstance(value, torch.Tensor):
            yield holder, key, value
        elif isinstance(value, dict | list):
            yield from _entries(value)


def _undo(optimizer: torch.optim.Optimizer) -> None:
    """See NOTE [A step that was not taken]."""
    last: _Step | None = optimizer.__dict__.pop(_LAST, None)
    if last is None or not any(session.was_undone(last.site, told) for session, told in last.told.items()):
        return
    for parameter, before in last.kept:
        if before:
            optimizer.state[parameter] = before
        else:
            optimizer.state.pop(parameter, None)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state of one parameter; counters are copied, since a step changes them where they are."""
    return {
        name: value.clone() if type(value) is torch.Tensor and value.dim() == 0 else value
        for name, value in state.items()
    }


def _strays(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, counters: bool
) -> Iterator[tuple[torch.Tensor, Place, Setter]]:
    """What belongs to a parameter and is elsewhere: the tensor, where it should be, and how to put it back."""
    here = _place(parameter)
    grad = parameter.grad
    if grad is not None and _place(grad) is not here:
        yield grad, here, lambda value: setattr(parameter, "grad", value)
    state = optimizer.state.get(parameter)
    for holder, key, value in _entries(state) if state else ():
        there = _place(value)
        if there is not here and (counters or there is not None or value.dim()):
            yield value, here, lambda moved, holder=holder, key=key: holder.__setitem__(key, moved)  # type: ignore[misc]


def _place(tensor: torch.Tensor) -> Place:
    return tensor._slot.session if isinstance(tensor, PointerTensor) else None
