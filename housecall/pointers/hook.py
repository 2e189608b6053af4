"""TorchHook: gives torch's classes the methods that the article uses. It adds, never overrides, and can be undone.

Tensor.send(worker)   Tensor.get()
Module.send(worker)   Module.get()         Module.request("why")   Module.get_update(since)
Optimizer.get()       Dataset.federate((a, b))
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import Dataset

from ..errors import UsageError
from .data import federate
from .module import get_module, request_module, send_module
from .optimizer import follow, get_state
from .tensor import send
from .update import get_update

__all__ = ["TorchHook"]


def _get(tensor: torch.Tensor) -> NoReturn:
    raise UsageError("this tensor is here already; .get() brings home what was sent with .send(worker)")


_ADDED: tuple[tuple[type, str, Any], ...] = (
    (torch.Tensor, "send", send),
    (torch.Tensor, "get", _get),
    (torch.nn.Module, "send", send_module),
    (torch.nn.Module, "get", get_module),
    (torch.nn.Module, "request", request_module),
    (torch.nn.Module, "get_update", get_update),
    (torch.optim.Optimizer, "get", get_state),
    (Dataset, "federate", federate),
)


class TorchHook:
    """`TorchHook(torch)` adds the methods above; `.remove()` takes them away again.

    Making it twice is harmless: the methods go with the last hook that is removed. Raises `UsageError` if
    torch, or another package, has a method of such a name."""

    _hooks: ClassVar[int] = 0
    _steps: ClassVar[Any] = None

    def __init__(self, torch_module: Any = torch) -> None:
        if torch_module is not torch:
            raise UsageError(f"TorchHook takes the torch module: TorchHook(torch), found {torch_module!r}")
        if TorchHook._hooks == 0:
            _add()
        TorchHook._hooks += 1
        self._removed = False

    def remove(self) -> None:
        """Take the methods away again, with the last hook. Pointers that exist go on working."""
        if self._removed:
            return
        self._removed = True
        TorchHook._hooks -= 1
        if TorchHook._hooks == 0:
            for owner, name, _ in _ADDED:
                delattr(owner, name)
            TorchHook._steps.remove()


def _add() -> None:
    for owner, name, _ in _ADDED:
        if hasattr(owner, name):
            raise UsageError(
                f"{owner.__name__}.{name} exists already, from torch or another package; remove that first"
            )
    for owner, name, method in _ADDED:
        setattr(owner, name, method)
    TorchHook._steps = register_optimizer_step_pre_hook(follow)
