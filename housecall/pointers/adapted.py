"""Modules of torch's that need help while they are away: what they do helps itself to this machine's memory, or takes
more calls than it needs (`chain`).

NOTE [First states]
`nn.LSTM` and kin make their first hidden state, zeros, where the input's `device` says; for a pointer that is here. So
while such a module is away a forward pre-hook of its own gives it zeros at the worker.

NOTE [Nested tensors]
In evaluation `nn.TransformerEncoder` packs padded sequences into a nested tensor, a layout that does not travel. While
it is away it takes the way that it takes in training, which gives the same.

NOTE [Plain kernels]
For `nn.LSTM` torch may take one kernel of oneDNN for all layers, and in evaluation one for a whole attention or encoder
layer. What these trust cannot be checked before they run (`program.trust`), so a worker that guards its memory refuses
them. There these modules take the way of small operators, which gives the same but for rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from . import chain
from .tensor import PointerTensor

__all__ = ["adapt", "restore"]

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_FUSED = (nn.LSTM, nn.MultiheadAttention, nn.TransformerEncoderLayer)


def _needs_help(kind: type[nn.Module]) -> bool:
    """Whether modules of this class may be among those of the NOTEs, or chains."""
    found = _helped.get(kind)
    if found is None:
        found = _helped[kind] = issubclass(kind, (*_FUSED, *_RECURRENT, nn.TransformerEncoder, nn.Sequential))
    return found


_helped: dict[type[nn.Module], bool] = {}


def adapt(parts: Iterable[nn.Module]) -> None:
    """Help these modules while they are away. Doing it twice is harmless."""
    for part in parts:
        if not _needs_help(type(part)):
            continue
        if isinstance(part, _FUSED):
            part.__dict__.setdefault("forward", functools.partial(_plainly, part))
        if type(part) is nn.Sequential and any(
            child._parameters for child in part._modules.values() if child is not None
        ):
            part.__dict__.setdefault("forward", functools.partial(chain.forward, part))
        if isinstance(part, _RECURRENT):
            if not any(hook is _with_first_state for hook in part._forward_pre_hooks.values()):
                part.register_forward_pre_hook(_with_first_state, with_kwargs=True)
        elif isinstance(part, nn.TransformerEncoder) and getattr(part, "use_nested_tensor", False):
            part.use_nested_tensor = False
            part.__dict__["_nested_at_home"] = True


def restore(parts: Iterable[nn.Module]) -> None:
    """Undo it."""
    for part in parts:
        if not _needs_help(type(part)):
            continue
        if getattr(part.__dict__.get("forward"), "func", None) in (_plainly, chain.forward):
            del part.__dict__["forward"]
        if isinstance(part, _RECURRENT):
            for key, hook in list(part._forward_pre_hooks.items()):
                if hook is _with_first_state:
                    del part._forward_pre_hooks[key]
                    part._forward_pre_hooks_with_kwargs.pop(key, None)
        elif part.__dict__.pop("_nested_at_home", False):
            part.use_nested_tensor = True  # type: ignore[assignment]  # torch types no attribute of a module


def _plainly(part: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`part.forward`, by NOTE [Plain kernels] where its worker guards its memory."""
    here = next((p for p in part.parameters() if isinstance(p, PointerTensor)), None)
    if here is None or not here._slot.session.guarded:
        return type(part).forward(part, *args, **kwargs)
    with _plain_kernels():
        return type(part).forward(part, *args, **kwargs)


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Within: torch takes no kernel that does a whole module's work."""
    fast, onednn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        torch._C._set_mkldnn_enabled(False)  # as `mkldnn.flags` does, which looks at other settings too, and warns
        yield
    finally:
        torch._C._set_mkldnn_enabled(onednn)
        torch.backends.mha.set_fastpath_enabled(fast)


def _with_first_state(part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of a recurrent module with zeros for a state that was not given: NOTE [First states]."""
    given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
    x = given.get("input")
    values = x.data if isinstance(x, PackedSequence) else x
    if not isinstance(values, PointerTensor) or given.get("hx") is not None:
        return None
    return (x, _first_state(part, x, values)), {}


def _first_state(part: Any, x: Any, values: torch.Tensor) -> Any:
    if isinstance(part, nn.RNNCellBase):
        state = values.new_zeros((*values.shape[:-1], part.hidden_size))
        return (state, torch.zeros_like(state)) if isinstance(part, nn.LSTMCell) else state
    if isinstance(x, PackedSequence):
        sizes: tuple[int, ...] = (int(x.batch_sizes[0]),)
    else:
        sizes = () if values.dim() == 2 else (values.shape[0 if part.batch_first else 1],)
    layers = part.num_layers * (2 if part.bidirectional else 1)
    hidden = values.new_zeros((layers, *sizes, part.proj_size or part.hidden_size))
    if isinstance(part, nn.LSTM):
        return hidden, values.new_zeros((layers, *sizes, part.hidden_size))
    return hidden
