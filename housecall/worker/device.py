"""A worker's home device: where what is sent goes at once, and what a caller without that device calls "cpu".

To a caller every pointer is on "cpu": the worker's own place, whichever that is. So at a worker whose home is a GPU a
call that names "cpu" (`zeros(..., device=x.device)`) means the GPU. A device that is named otherwise is meant.
"""

from __future__ import annotations

import torch

from ..errors import UsageError
from ..program.call import Arg, Call, Symbol
from ..wire.messages import Array, Frame, Message, Put

__all__ = ["at_home", "home"]

_CPU = Symbol("device", "cpu")


def home(name: str) -> torch.device:
    """The device of this name. Raises `UsageError` if this machine has none such."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device '{name}': this machine has no CUDA device, or torch was built without; use 'cpu'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device '{name}': this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def at_home(frame: Frame, device: torch.device) -> Frame:
    """The same frame with what is sent on `device`, and "cpu" meaning it."""
    here = Symbol("device", str(device))
    return Frame(frame.number, tuple([_placed(message, device, here) for message in frame.messages]))


def _placed(message: Message, device: torch.device, here: Symbol) -> Message:
    match message:
        case Put(id=ref, value=value):
            return Put(ref, Array(None, value.data.to(device)))
        case Call(op=op, args=args, kwargs=kwargs, outs=outs):
            named = {name: _meant(arg, here) for name, arg in kwargs.items()}
            return Call(op, tuple([_meant(arg, here) for arg in args]), named, outs)
    return message


def _meant(arg: Arg, here: Symbol) -> Arg:
    return here if arg == _CPU else arg
