"""Values that came home from a worker on a wire and have not changed since: their slots still stand there.

A model goes to the same worker batch after batch. Between two of them it came home and nobody touched it, so what
would be sent is what the worker just gave. Its slots are kept until the next values come home from that worker, and
a tensor that is sent back unchanged gets its old slot instead of travelling.

NOTE [Unchanged]
Each kept value holds a second, lazy copy of what came home (`torch._lazy_clone`). As long as nobody has written, both
lie at one address; whoever writes, also through `.data` or a numpy array, first gets memory of their own. So the
address says it, for the price of looking; a version counter would miss `.data`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from ..program.typing import type_of
from ..types import TensorType

__all__ = ["Kept"]

LEAST_BYTES = 4096  # smaller values travel within a message, and are not worth keeping

_address: Any = torch._C._data_address  # type: ignore[attr-defined]  # reads the address without asking to write
_is_shared: Any = torch._C._is_cow_tensor  # type: ignore[attr-defined]  # as above: not in torch's stubs


class Kept:
    """The values that came home last, by address."""

    def __init__(self) -> None:
        self.values: dict[int, tuple[TensorType, torch.Tensor, Any]] = {}

    def keep(self, values: list[tuple[Any, torch.Tensor]]) -> None:
        """Keep the slots of what came home now, and let go of what came before. Small values change nothing: a loss
        that is fetched after a model does not make it travel again."""
        came = {}
        for slot, value in values:
            if value.nbytes >= LEAST_BYTES and value.is_cpu:
                copy = torch._lazy_clone(value)
                came[_address(copy)] = type_of(value), copy, slot
        if came:
            self.values = came

    def slot(self, tensor: torch.Tensor) -> Any:
        """The slot of a tensor that is there already, unchanged, with nobody else pointing at it; or `None`."""
        if not self.values or not _is_shared(tensor):
            return None
        found = self.values.get(_address(tensor))
        if found is None or found[0] != type_of(tensor):
            return None
        _, _, slot = self.values.pop(_address(tensor))
        del found
        # Counted: `slot` here, and getrefcount's own argument. A pointer that shares it would see our changes.
        return slot if sys.getrefcount(slot) == 2 else None

    def clear(self) -> None:
        """Let go of everything."""
        self.values.clear()
