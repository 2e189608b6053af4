"""The only door out: every value that leaves a worker leaves through `release`.

Today the door asks nobody: all that a session holds, its own principal sent or computed. It stands here, with
one caller, so that the owner's policy and ledger have one place to go.
"""

from __future__ import annotations

import torch

from ..transport.arrays import share
from ..wire.messages import Array

__all__ = ["release"]


def release(value: torch.Tensor) -> Array:
    """The elements of a value, on their way out: its own, never the rest of its storage."""
    return share(value)
