"""Writes in place that need no graph, such as an optimizer's: taken without torch's dispatcher.

`parameter.add_(gradient, alpha=-rate)` goes down through torch's dispatcher, layer after layer, and back into Python,
to become one step of the trace that was expected. Where no graph is recorded and nothing stands between (`aside`) the
one thing that torch does on the way is to count the write, for graphs that have saved the value.

What must live here: methods of pointers that write. What must not: whether a call is the expected one (`repeat`), and
any other call: that goes down as torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .aside import nothing_between
from .repeat import again

__all__ = ["NAMES", "writing"]

# Those whose arguments torch hands down as they come. Numbers that are the default it leaves out: not expected, then.
NAMES = ("add_", "addcdiv_", "addcmul_", "div_", "lerp_", "mul_", "sub_")

_is_recorded = torch.is_grad_enabled
_count: Any = torch._C._increment_version


def writing(cls: Any, name: str) -> Callable[..., Any]:
    """The method of this name of pointers of class `cls`."""
    plain = getattr(torch.Tensor, name)
    packet = getattr(torch.ops.aten, name)
    known = {id(getattr(packet, which)) for which in packet.overloads()}  # they live for ever, and hash in Python

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        session = self._slot.session
        expected = session.trace.step.next
        if expected is not None and id(expected.pattern[0]) in known and not _is_recorded() and nothing_between():
            found = None if self.is_inference() else again(cls, session, expected, (self, *args), kwargs)
            if found is not None:
                _count((self,))
                return found
        return plain(self, *args, **kwargs)

    method.__name__, method.__qualname__ = name, f"{cls.__name__}.{name}"
    method.__doc__ = f"As torch's `Tensor.{name}`."
    method._torchdynamo_disable = True  # type: ignore[attr-defined]  # torch.compile's mark: not to be traced into
    return method
