"""Send a module to a worker and bring it home, in place: parameters and buffers keep their identity.

NOTE [Swapping]
An optimizer, a tied layer, an RNN's list of weights: all hold the parameter *objects*. So the object stays and
what it holds is exchanged (`torch._C._swap_tensor_impl`, of which `torch.utils.swap_tensors` is the careful
form). Unlike that form we allow weak references, since `nn.RNN` and kin keep some to their own weights and these
stay right: the object they refer to is the one that stays. A graph that was built before the swap keeps the
old value; running it backward afterwards would collect gradients that nobody reads, so it raises instead.

NOTE [Whole or not at all]
Everything that can be wrong with a tensor is looked at before the first is swapped. While a module is at a remote
worker each parameter keeps what it held at home, and has it again if that worker is gone.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from contextlib import nullcontext
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import HousecallError, UsageError, WorkerGone
from ..transport.whole import whole
from ..wire.messages import Failure
from . import spare
from .adapted import adapt, restore
from .aside import plainly
from .calls import point
from .late import LateTensor, Visit, at_hand
from .request import OwnersAnswer, ask_owner
from .session import Session
from .site import Site, Spot, caller_again
from .slot import Slot
from .tensor import PointerTensor, check_travels, session_of, sessions_of

__all__ = ["check_returns", "get_module", "location_of", "modules_of", "request_module", "return_home", "send_module"]


_SENDING = Spot()


def send_module(module: nn.Module, location: Any) -> nn.Module:
    """Send every parameter and buffer, with their gradients; the module itself is returned.

    Nothing waits. Raises `UsageError` if any of them is at a worker already or cannot travel, `WorkerGone` if the
    worker is known to be lost; then all of them are where they were."""
    session = session_of(location)
    session.check_open()
    parts, tensors = _walked(module)
    with plainly():
        for tensor in tensors:
            _check_leaves(tensor)
        with whole():  # Ctrl-C finds the module here or there
            _leave_all(tensors, session, caller_again(_SENDING))
            adapt(parts)
    session.relieve()
    return module


def _leave_all(tensors: list[torch.Tensor], session: Session, site: Site | None) -> None:
    homes: list[torch.Tensor] = []
    turned: list[Any] = []  # gradients that became pointers themselves
    recording = torch.is_grad_enabled()
    try:
        torch._C._set_grad_enabled(False)  # what is sent is no part of a graph
        for tensor in tensors:
            homes.append(_leave(tensor, session, site, turned))
    except BaseException:
        for tensor, home in zip(tensors, homes, strict=False):
            _return_again(tensor, home)
        visit = Visit(session)
        for grad in turned:
            visit.take(grad)
        raise
    finally:
        torch._C._set_grad_enabled(recording)


def get_module(module: nn.Module) -> nn.Module:
    """Bring every parameter and buffer home, in one round trip; return the module. Gradients come when somebody looks
    at them: `late`.

    Raises `UsageError` if it is at home; `PolicyError` if the worker's owner keeps any of it, and it is all still
    there; `OperatorError` if a write failed that nobody has heard of, and it is home; `WorkerGone` if the worker is
    lost, and then it is home as it was when it was sent, if it was at a remote worker."""
    parts, tensors = _walked(module)
    pointers = [tensor for tensor in tensors if isinstance(tensor, PointerTensor)]
    if not pointers:
        raise UsageError("this module is at home already: .send(worker) it first")
    with plainly():
        for pointer in pointers:
            check_returns(pointer)
    troubles = [
        _bring_home(session, [pointer for pointer in pointers if pointer._slot.session is session])
        for session in sessions_of(pointers)
    ]
    restore(parts)
    for trouble in troubles:
        if trouble is not None:
            raise trouble
    return module


def request_module(module: nn.Module, reason: str) -> OwnersAnswer:
    """Ask the worker's owner to let parameters and buffers out, once, as they are now; gradients are not asked for."""
    pointers = [tensor for tensor in _walked(module)[1] if isinstance(tensor, PointerTensor)]
    sessions = sessions_of(pointers)
    if len(sessions) != 1:
        raise UsageError("this module is at home, or at several workers: .send(worker) it to one, and ask there")
    return ask_owner(sessions.pop(), [pointer._slot for pointer in pointers], reason)


def location_of(module: nn.Module) -> Any:
    """The worker where a module is, `None` at home."""
    for session in sessions_of(_walked(module)[1]):
        return session.location
    return None


def modules_of(module: nn.Module) -> list[nn.Module]:
    """The module and all within it, each once."""
    return _walked(module)[0]


def _walked(module: nn.Module) -> tuple[list[nn.Module], list[torch.Tensor]]:
    """The module and all within it; their parameters and buffers: each once, however often it is shared. As
    `Module.modules` and kin, which spend most of their time on names."""
    parts, seen = [module], {id(module)}
    tensors: dict[int, torch.Tensor] = {}
    for part in parts:  # grows while it is walked
        own = part.__dict__  # behind every other attribute stands `Module.__getattr__`
        if "_modules" in own:
            parameters, buffers, children = own["_parameters"], own["_buffers"], own["_modules"]
        else:  # torch.jit's
            parameters, buffers, children = part._parameters, part._buffers, part._modules
        for held in (parameters, buffers):
            for tensor in held.values():
                if tensor is not None:
                    tensors[id(tensor)] = tensor
        for child in children.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                parts.append(child)
    return parts, list(tensors.values())


def _check_leaves(tensor: torch.Tensor) -> None:
    """Raise `UsageError` for a parameter or buffer that cannot leave."""
    if isinstance(tensor, PointerTensor):
        raise UsageError(
            f"this module is at '{tensor.location.id}' already: bring it home with .get() before it is sent on"
        )
    if is_lazy(tensor):
        raise UsageError("this module has lazy parameters, which have no shape yet: run it once at home first")
    _check_hooks(tensor)
    check_travels(tensor)


def check_returns(pointer: PointerTensor) -> None:
    """Raise `UsageError` for a parameter or buffer that cannot come home."""
    _ = pointer._slot.session  # raises for one that is spent
    _check_hooks(pointer)


def _check_hooks(tensor: torch.Tensor) -> None:
    if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
        raise UsageError("a parameter with hooks cannot travel, they would not go with it: remove them first")


def _bring_home(session: Session, pointers: list[PointerTensor]) -> HousecallError | None:
    """Bring these home, and return what is to be said of it. Raises if they stay."""
    with nullcontext() if session.transport.remote else whole():  # a worker in this process is not left waiting
        return _brought_home(session, pointers)


def _brought_home(session: Session, pointers: list[PointerTensor]) -> HousecallError | None:
    try:
        values, trouble = session.bring([pointer._slot for pointer in pointers])
    except WorkerGone as gone:
        if any("_home" not in pointer.__dict__ for pointer in pointers):
            raise
        with whole():
            for pointer in pointers:
                _return_again(pointer, _home_of(pointer))
        return WorkerGone(f"{gone}. The module is home, as it was when it was sent")
    for value in values:
        if isinstance(value, Failure):
            raise session.error(value)
    visit = Visit(session)
    with whole(), plainly():
        for pointer, value in zip(pointers, values, strict=True):
            grad: Any = pointer.grad
            if pointer.requires_grad:
                value.requires_grad = True
            if grad is not None and type(grad._slot) is Slot:  # else it is spent
                value.grad = _left(grad, visit) if grad._slot.session is session else grad
            return_home(pointer, value)
    return trouble


def _left(grad: PointerTensor, visit: Visit) -> LateTensor:
    """A gradient at home whose value stays at the worker. If nobody else has the pointer, it is that from now on."""
    return visit.take(grad) if _is_its_own(grad) and not grad.requires_grad else visit.leave(grad._slot)


def _is_its_own(grad: Any) -> bool:
    """Whether only a tensor refers to its gradient: and whoever asks, once, of one that has it as well.

    Counted: by Python in those two, here, for the asking, and in torch's tensor; by torch that, and Python's object.
    Where torch counts in another way the answer is no, and a gradient changes its object."""
    return bool(sys.getrefcount(grad) == 5 and grad._use_count() == 2)


def _leave(tensor: torch.Tensor, session: Session, site: Site | None, turned: list[Any]) -> torch.Tensor:
    """Let a parameter or buffer be a pointer to a copy of what it holds; another tensor that holds that now."""
    kind = type(tensor)
    slot = session.put(tensor, site)
    pointer: Any = spare.pointer(PointerTensor, slot, tensor.requires_grad)
    grad: Any = tensor.grad  # a parameter that was frozen may have one
    if grad is not None:
        pointer.grad = grad if isinstance(grad, PointerTensor) else _sent_gradient(grad, session, site, turned)
    _swap(tensor, pointer)
    tensor.__class__, pointer.__class__ = PointerTensor, kind
    del pointer.__dict__["_slot"]
    held = tensor.__dict__
    held["_slot"], held["_home_class"], held["_is_param"] = slot, kind, issubclass(kind, nn.Parameter)
    if session.transport.remote:
        held["_home"] = pointer
    _watch(pointer)
    return pointer  # type: ignore[no-any-return]  # it was one


def _sent_gradient(grad: torch.Tensor, session: Session, site: Site | None, turned: list[Any]) -> Any:
    """A pointer to a gradient that goes along. One that never came home is there already, or is brought when used; if
    nobody else has it, and it will not be asked for at home when the worker is lost, it is the pointer itself."""
    if not isinstance(grad, LateTensor) or grad._slot is None:
        return point(PointerTensor, session.put(at_hand(grad), site))
    slot = grad._slot
    if slot.session is not session:
        return point(PointerTensor, session.put_later(grad, slot.spec, site))
    if session.transport.remote or not _is_its_own(grad):
        return point(PointerTensor, slot)
    pointer = grad.back(PointerTensor)
    turned.append(pointer)
    return pointer


def return_home(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Let a parameter or buffer that is a pointer hold a value again."""
    held = tensor.__dict__
    kind, slot = held.get("_home_class") or _plain_class(tensor), held["_slot"]
    _swap(tensor, value)
    tensor.__class__, value.__class__ = kind, PointerTensor
    for name in _HELD:
        held.pop(name, None)
    value._slot = _MOVED  # type: ignore[attr-defined]  # a graph may hold it; nobody else does
    _watch(value)
    spare.keep(value, slot)


def _return_again(tensor: torch.Tensor, home: torch.Tensor) -> None:
    """Let a parameter or buffer hold what it held when it left; a graph of that time holds again."""
    home._backward_hooks = None  # ours: a parameter with hooks of its own does not travel
    return_home(tensor, home)


_HELD = ("_slot", "_is_param", "_id", "_home_class", "_home")


def _home_of(pointer: Any) -> torch.Tensor:
    """What a pointer's tensor held when it left."""
    return pointer.__dict__["_home"]  # type: ignore[no-any-return]  # a tensor


def _swap(tensor: torch.Tensor, other: torch.Tensor) -> None:
    """Let two tensor objects hold what the other holds. See NOTE [Swapping]."""
    try:
        torch._C._swap_tensor_impl(tensor, other)
    except RuntimeError as error:  # nothing has changed yet
        raise UsageError(
            f"a parameter cannot be moved while torch holds it elsewhere (autocast's cache?): {error}"
        ) from None


def _watch(left: Any) -> None:
    """What a graph still holds of a tensor that has moved must not be used again."""
    if left._use_count() > 1 and left.requires_grad and left.is_leaf:
        left._backward_hooks = _STALE_HOOKS  # as `register_hook`, which makes such a dict for each


def _plain_class(pointer: torch.Tensor) -> type[torch.Tensor]:
    """What a pointer that never was at home (a deep copy made at the worker) becomes there."""
    return nn.Parameter if getattr(pointer, "_is_param", False) else torch.Tensor


_STALE = (
    "backward through a module that has moved since its forward: call loss.backward() before the next model.get() or "
    "model.send()"
)


class _Moved:
    """Stands where the slot was, in what an old graph still holds of a module that came home: the slot itself must not
    outlive the visit because of it."""

    trace = None

    @property
    def session(self) -> NoReturn:
        raise UsageError(_STALE)


_MOVED = _Moved()


def _stale(grad: Any) -> NoReturn:
    raise UsageError(_STALE)


_STALE_HOOKS = OrderedDict([(0, _stale)])
