"""Local tensors among the arguments of a call on pointers: which of them go along, and which are a mistake.

NOTE [Tensors that torch makes]
Composite operators (`quantile`, causal attention) make constants where `device` says, and for a pointer that is here.
Such a tensor is known by being known to nobody: its Python object was made for this very call, so only the argument
tuple refers to it, and to its base if it is a view. A tensor of the caller's, even one that was never given a name, is
on some Python stack as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import PlaceError

__all__ = ["LocalTensor", "adopted"]

# Parameters that hold positions or torch's own draws, not data: torch makes them here, in Python, or lets them
# be on the CPU beside a CUDA tensor (`x[[0, 2]]`).
_POSITIONS = frozenset(("indices", "offsets", "random_samples"))


class LocalTensor(Exception):  # not an error yet: `adopted` decides
    """A local tensor with dimensions stands among the arguments."""


def adopted(
    cls: Any,
    name: str,
    params: Sequence[str],
    where: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    send: Callable[[torch.Tensor], Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of operator `name` with such local tensors sent along as may be; a `PlaceError` for any other.

    `cls` is the class of pointers, `where` the worker that they are at, `send` gives a pointer for a local tensor."""

    def one(holder: Any, at: Any, param: str) -> Any:
        found = holder[at]
        if isinstance(found, list | tuple):
            return [one(found, index, param) for index in range(len(found))]
        if not isinstance(found, torch.Tensor) or type(found) is cls or found.dim() == 0:
            return found
        del found
        if param in _POSITIONS or _unheld(holder, at):
            return send(holder[at])
        raise PlaceError(
            f"{name} was given a tensor at '{where}' and a local one of shape {tuple(holder[at].shape)}. "
            f"Send the local one there with .send({where}), or bring the other home with .get(). A new one is made "
            "there by x.new_ones(...), x.new_zeros(...), torch.zeros_like(x)"
        )

    return (
        tuple([one(args, index, params[index]) for index in range(len(args))]),
        {param: one(kwargs, param, param) for param in kwargs},
    )


def _unheld(holder: Any, at: Any) -> bool:
    """Whether nothing but `holder` refers to the Python object at `at`, nor to that of its base. Counted are
    getrefcount's own argument, torch's tensor (which keeps its Python object), and the holder."""
    if sys.getrefcount(holder[at]) > 3:
        return False
    return not holder[at]._is_view() or sys.getrefcount(holder[at]._base) <= 2
