"""Send a module to a worker and bring it home, in place: parameters and buffers keep their identity.

NOTE [Swapping]
An optimizer, a tied layer, an RNN's list of weights: all hold the parameter *objects*. So the object stays and
what it holds is exchanged (`torch._C._swap_tensor_impl`, of which `torch.utils.swap_tensors` is the careful
form). Unlike that form we allow weak references, since `nn.RNN` and kin keep some to their own weights and these
stay right: the object they refer to is the one that stays. A graph that was built before the swap keeps the
old value; running it backward afterwards would collect gradients that nobody reads, so it raises instead.

NOTE [First states]
`nn.LSTM` and kin make their first hidden state, zeros, where the input's `device` says; for a pointer that is
here. So while such a module is away a forward pre-hook of its own gives it zeros at the worker.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import UsageError
from .request import OwnersAnswer, ask_owner
from .session import Session, caller
from .tensor import PointerTensor, sent, session_of, sessions_of

__all__ = ["get_module", "give_first_states", "module_location", "request_module", "send_module"]


def send_module(module: nn.Module, location: Any) -> nn.Module:
    """Send every parameter and buffer, with their gradients; the module itself is returned.

    Nothing waits. Raises `UsageError` if any of them is at a worker already."""
    session = session_of(location)
    parts = _parts(module)
    tensors = _tensors(parts)
    for tensor in tensors:
        if isinstance(tensor, PointerTensor):
            raise UsageError(
                f"this module is at '{tensor.location.id}' already: bring it home with .get() before it is sent on"
            )
    site = caller()
    for tensor in tensors:
        _exchange(tensor, sent(session, tensor, site))
    session.relieve()
    give_first_states(parts)
    return module


def give_first_states(parts: Iterable[nn.Module]) -> list[RemovableHandle]:
    """Let the recurrent ones of these make their first states at the worker: NOTE [First states]. What undoes it."""
    return [
        part.register_forward_pre_hook(_with_first_state)
        for part in parts
        if isinstance(part, _RECURRENT)
        and not any(hook is _with_first_state for hook in part._forward_pre_hooks.values())
    ]


def get_module(module: nn.Module) -> nn.Module:
    """Bring every parameter and buffer home, with their gradients, in one round trip; return the module."""
    parts = _parts(module)
    pointers = [tensor for tensor in _tensors(parts) if isinstance(tensor, PointerTensor)]
    if not pointers:
        raise UsageError("this module is at home already: .send(worker) it first")
    for session in sessions_of(pointers):
        _bring_home(session, [pointer for pointer in pointers if pointer._slot.session is session])
    for part in parts:
        if isinstance(part, _RECURRENT):
            for key, hook in list(part._forward_pre_hooks.items()):
                if hook is _with_first_state:
                    del part._forward_pre_hooks[key]
    return module


def request_module(module: nn.Module, reason: str) -> OwnersAnswer:
    """Ask the worker's owner to let parameters and buffers out, once, as they are now; gradients are not asked for."""
    pointers = [tensor for tensor in _tensors(_parts(module)) if isinstance(tensor, PointerTensor)]
    sessions = sessions_of(pointers)
    if len(sessions) != 1:
        raise UsageError("this module is at home, or at several workers: .send(worker) it to one, and ask there")
    return ask_owner(sessions.pop(), [pointer._slot for pointer in pointers], reason)


def module_location(module: nn.Module) -> Any:
    """The worker where the module is, `None` at home."""
    for session in sessions_of(_tensors(_parts(module))):
        return session.location
    return None


def _parts(module: nn.Module) -> list[nn.Module]:
    """The module and all within it, each once. As `Module.modules`, which spends most of its time on names."""
    found, seen = [module], {id(module)}
    for part in found:  # grows while it is walked
        for child in part._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found


def _tensors(parts: list[nn.Module]) -> list[torch.Tensor]:
    """Parameters and buffers, each once, however often it is shared."""
    found: dict[int, torch.Tensor] = {}
    for part in parts:
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None:
                found[id(tensor)] = tensor
    return list(found.values())


def _bring_home(session: Session, pointers: list[PointerTensor]) -> None:
    grads = [pointer.grad for pointer in pointers]
    at_worker = [grad for grad in grads if isinstance(grad, PointerTensor) and grad._slot.session is session]
    values = session.fetch([tensor._slot for tensor in (*pointers, *at_worker)])
    homes = dict(zip(map(id, at_worker), values[len(pointers) :], strict=True))
    for pointer, grad, value in zip(pointers, grads, values, strict=False):
        value.requires_grad_(pointer.requires_grad)
        if grad is not None:
            value.grad = homes.get(id(grad), grad)
        _exchange(pointer, value)


def _exchange(tensor: torch.Tensor, other: torch.Tensor) -> None:
    """Let `tensor` hold what `other` holds, and the other way round; both objects stay. See NOTE [Swapping]."""
    if tensor._backward_hooks:
        raise UsageError("a parameter with hooks cannot travel, they would not run at the worker: remove them first")
    arriving = isinstance(other, PointerTensor)
    away, home = (other, tensor) if arriving else (tensor, other)
    slot = away._slot  # type: ignore[attr-defined]  # `away` is the pointer of the two
    kind = type(home) if arriving else tensor.__dict__.get("_home_class", _plain_class(tensor))
    try:
        torch._C._swap_tensor_impl(tensor, other)
    except RuntimeError as error:  # nothing has changed yet
        raise UsageError(
            f"a parameter cannot be moved while torch holds it elsewhere (autocast's cache?): {error}"
        ) from None
    tensor.__class__, other.__class__ = (PointerTensor, kind) if arriving else (kind, PointerTensor)
    if arriving:
        tensor._slot = slot  # type: ignore[attr-defined]  # it is a pointer now
        tensor.__dict__["_home_class"] = kind
        tensor._is_param = issubclass(kind, nn.Parameter)  # torch's own mark
        del other.__dict__["_slot"]
    else:
        for name in ("_slot", "_is_param", "_id", "_home_class"):
            tensor.__dict__.pop(name, None)
        other._slot = _MOVED  # type: ignore[attr-defined]  # a graph may hold it; nobody else does
    if _shared(other) and other.requires_grad and other.is_leaf:
        other.register_hook(_stale)


def _shared(tensor: Any) -> bool:
    """Whether a graph still holds what this tensor object holds."""
    return bool(tensor._use_count() > 1)


def _plain_class(pointer: torch.Tensor) -> type[torch.Tensor]:
    """What a pointer that never was at home (a deep copy made at the worker) becomes there."""
    return nn.Parameter if getattr(pointer, "_is_param", False) else torch.Tensor


_RECURRENT = (nn.RNNBase, nn.RNNCellBase)

_STALE = (
    "backward through a module that has moved since its forward: call loss.backward() before the next model.get() or "
    "model.send()"
)


class _Moved:
    """Stands where the slot was, in what an old graph still holds of a module that came home: the slot itself must not
    outlive the visit because of it."""

    @property
    def session(self) -> NoReturn:
        raise UsageError(_STALE)


_MOVED = _Moved()


def _stale(grad: Any) -> NoReturn:
    raise UsageError(_STALE)


def _with_first_state(part: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The arguments of a recurrent module with zeros for a state that was not given: NOTE [First states]."""
    if len(args) != 1 or not isinstance(args[0], PointerTensor):
        return None
    x = args[0]
    if isinstance(part, nn.RNNCellBase):
        batch = x.shape[:-1]
        state = x.new_zeros((*batch, part.hidden_size))
        return (x, (state, x.new_zeros((*batch, part.hidden_size)))) if isinstance(part, nn.LSTMCell) else (x, state)
    sizes = () if x.dim() == 2 else (x.shape[0 if part.batch_first else 1],)
    layers = part.num_layers * (2 if part.bidirectional else 1)
    hidden = x.new_zeros((layers, *sizes, part.proj_size or part.hidden_size))
    if isinstance(part, nn.LSTM):
        return x, (hidden, x.new_zeros((layers, *sizes, part.hidden_size)))
    return x, hidden
