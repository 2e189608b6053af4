"""An optimizer's state follows its parameters, before each step and only if it must.

torch calls a hook before every `step` of every optimizer (`register_optimizer_step_pre_hook`, its own public
point). Ours looks whether a parameter's gradient and state (momentum, moments ...) are where the parameter is,
and brings what is not: in one round trip for each worker that is left. State without dimensions that is local
(`step` counters) stays local: optimizers read it as a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .session import Session
from .tensor import PointerTensor, send

__all__ = ["follow"]

Place = Session | None
Setter = Callable[[torch.Tensor], None]


def follow(optimizer: torch.optim.Optimizer, args: Any = (), kwargs: Any = None) -> None:
    """Bring gradients and state to their parameters; what is there already costs nothing."""
    strays = [stray for group in optimizer.param_groups for p in group["params"] for stray in _strays(optimizer, p)]
    for session in {_place(tensor) for tensor, _, _ in strays}:
        leaving = [stray for stray in strays if _place(stray[0]) is session]
        tensors = [tensor for tensor, _, _ in leaving]
        values = tensors if session is None else session.fetch([tensor._slot for tensor in tensors])  # type: ignore[attr-defined]  # those with a session are pointers
        for value, (_, target, put) in zip(values, leaving, strict=True):
            put(value if target is None else send(value.detach(), target.location))


def _strays(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> Iterator[tuple[torch.Tensor, Place, Setter]]:
    """What belongs to a parameter and is elsewhere: the tensor, where it should be, and how to put it back."""
    here = _place(parameter)
    grad = parameter.grad
    if grad is not None and _place(grad) is not here:
        yield grad, here, lambda value: setattr(parameter, "grad", value)
    state = optimizer.state.get(parameter)
    if state:
        yield from _within(state, here)


def _within(holder: Any, here: Place) -> Iterator[tuple[torch.Tensor, Place, Setter]]:
    items = holder.items() if isinstance(holder, dict) else enumerate(holder)
    for key, value in list(items):
        if isinstance(value, torch.Tensor):
            there = _place(value)
            if there is not here and not (there is None and value.dim() == 0):
                yield value, here, lambda moved, key=key: holder.__setitem__(key, moved)  # type: ignore[misc]
        elif isinstance(value, dict | list):
            yield from _within(value, here)


def _place(tensor: torch.Tensor) -> Place:
    return tensor._slot.session if isinstance(tensor, PointerTensor) else None
