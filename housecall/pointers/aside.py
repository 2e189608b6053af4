"""What stands between what is called and the operators below, and how to go without it.

A mode, autocast, a transform of `torch.func`, forward-mode autograd and anomaly detection each want to see every
operator, or make other operators of it. Where one is on, what is known of a graph or of a layer is not said at once.
And torch asks the class of every tensor whether it does an operation in its own way (`__torch_function__`), for each
attribute too: to ask costs more than most attributes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

__all__ = ["nothing_between", "plainly"]


_c: Any = torch._C
_CHECKS = (
    _c._len_torch_dispatch_stack,
    _c._len_torch_function_stack,
    _c._are_functorch_transforms_active,
    _c._is_any_autocast_enabled,
    torch.is_anomaly_enabled,
    torch.is_inference_mode_enabled,
)


def plainly() -> Any:
    """A context within which torch does not ask the classes of tensors."""
    return _c.DisableTorchFunctionSubclass()


def nothing_between() -> bool:
    """Whether none of these is on."""
    for is_on in _CHECKS:
        if is_on():
            return False
    return bool(forward_ad._current_level < 0)
