"""PointerTensor: a real `torch.Tensor` (shape, dtype, autograd) whose value is a slot in a worker's store.

Each ATen operation on it becomes one `Call` (`dispatch`). Autograd runs above, on the caller's side, so
`loss.backward()` and `optimizer.step()` are only more calls. Torch is not patched: this is its own extension
point, `__torch_dispatch__`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch

from ..errors import SpentPointerError, UsageError
from ..program.typing import DTYPES
from ..wire.codec import ITEM_BYTES
from ..wire.messages import Failure
from . import backward, in_place
from .calls import point
from .dispatch import dispatch
from .late import at_hand
from .request import OwnersAnswer, ask_owner
from .session import Session
from .site import Site
from .slot import Slot

__all__ = ["PointerTensor", "Spent", "check_travels", "is_at", "send", "sent", "session_of", "sessions_of", "spend"]


class Spent:
    """Stands where a slot was, after `.get()` or `.move()` took the value away."""

    def __init__(self, slot: Slot, taken_by: str) -> None:
        self._text = (
            f"this pointer is spent: {taken_by} took its value away from '{slot.session.location.id}'. "
            "Use what that returned; to look at a value and keep the pointer, call .copy().get()"
        )

    trace = None

    @property
    def session(self) -> NoReturn:
        """Always an error: there is no value here any more."""
        raise SpentPointerError(self._text)


class PointerTensor(torch.Tensor):
    """A tensor at a worker. `.get()` brings it home, `.location` says where it is."""

    _slot: Slot

    # Everything is done below, where autograd has already run: the Python-level protocol would only cost.
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    __torch_dispatch__ = classmethod(dispatch)  # type: ignore[assignment]  # torch types its own as a stub

    # -- where --------------------------------------------------------------------------------------------

    @property
    def location(self) -> Any:
        """The worker that holds the value."""
        return self._slot.session.location

    @property
    def id_at_location(self) -> int:
        """The id of the slot: a key of the worker's `_objects`."""
        _ = self._slot.session
        return self._slot.id

    @property
    def id(self) -> int:
        """This pointer's own number, as printed."""
        found = self.__dict__.get("_id")
        if found is None:
            found = self.__dict__["_id"] = next(self._slot.session.ids)
        return int(found)

    # -- moving -------------------------------------------------------------------------------------------

    def get(self) -> torch.Tensor:
        """Bring the value home, and the gradient of a leaf with it. The worker holds it no longer, unless
        another pointer shares it. Costs one round trip; raises `OperatorError` if the value's call failed.

        A value that was computed comes home as a plain tensor: its graph stays with the pointers."""
        if "_home_class" in self.__dict__ or getattr(self, "_is_param", False):
            raise UsageError(
                "this is a parameter or buffer of a module: call .get() on the module, or .copy().get() here"
            )
        slots = [self._slot]
        session = self._slot.session
        grad = self.grad if self.is_leaf else None
        if isinstance(grad, PointerTensor) and is_at(grad, session):
            slots.append(grad._slot)
        values, trouble = session.bring(slots)
        if trouble is not None or isinstance(values[0], Failure):
            raise trouble or session.error(values[0])
        value: torch.Tensor = values[0]
        came = values[1] if len(values) > 1 else None
        if self.is_leaf and self.requires_grad:
            value.requires_grad_()
            # A gradient that may not leave, or failed, stays where it is: the value is here, its approval is used up.
            value.grad = came if isinstance(came, torch.Tensor) else grad
            if isinstance(grad, PointerTensor) and isinstance(came, torch.Tensor):
                spend(grad, ".get()")
        spend(self, ".get()")
        return value

    def copy(self) -> PointerTensor:
        """A second value at the same worker, equal to this one."""
        _ = self._slot.session
        clone: PointerTensor = self.detach().clone()  # type: ignore[assignment]  # dispatch returns pointers
        return clone.requires_grad_() if self.requires_grad and self.is_leaf else clone  # type: ignore[return-value]

    def move(self, other: Any) -> PointerTensor:
        """Take the value to another worker, by way of this process; this pointer is spent.

        Raises `UsageError` for a value that was computed with autograd: its graph does not go with it."""
        if other is self.location:
            return self
        if self.requires_grad and not self.is_leaf:
            raise UsageError(
                "this tensor was computed, and autograd does not cross to another worker: move its inputs, or "
                ".detach() it first"
            )
        session_of(other)  # before the value leaves where it is
        slot = self._slot
        moved = send(self.get(), other)
        self._slot = Spent(slot, f".move({other})")  # type: ignore[assignment]  # as in `spend`
        return moved

    def send(self, other: Any) -> NoReturn:
        """Always an error: the value is at a worker already."""
        here, there = self.location.id, getattr(other, "id", other)
        what = "it is there already" if here == there else f"to take it on, call .move({there})"
        raise UsageError(f"this tensor lives at '{here}' and was to be sent to '{there}': {what}")

    def tag(self, *tags: str) -> PointerTensor:
        """Tag the value ("#dna"), so that its worker's `search` finds it. Returns this pointer."""
        return self.location.tag(self, *tags)  # type: ignore[no-any-return]  # a Location returns the pointer

    def describe(self, description: str) -> PointerTensor:
        """Describe the value in words. Returns this pointer."""
        return self.location.describe(self, description)  # type: ignore[no-any-return]  # as above

    def request(self, reason: str) -> OwnersAnswer:
        """Ask the worker's owner to let this value out once, as it is now: `x.request("why").wait()`, then `.get()`."""
        return ask_owner(self._slot.session, [self._slot], reason)

    # -- autograd: torch's, and noted where it could be changed from outside: `backward` ----------------------

    def backward(
        self, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
    ) -> None:
        """As torch's."""
        if gradient is None and not retain_graph and not create_graph and inputs is None:
            backward.backward(PointerTensor, self, super().backward)
        else:
            super().backward(gradient, retain_graph, create_graph, inputs)  # type: ignore[no-untyped-call]  # torch's

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]  # torch's stubs take it for an attribute
        """As torch's."""
        if type(self._slot) is Slot:  # else it is spent
            self._slot.session.watched = True
        return backward.grad_fn(self)

    def register_hook(self, hook: Any) -> Any:
        """As torch's."""
        if type(self._slot) is not Slot:
            return super().register_hook(hook)  # type: ignore[no-untyped-call]  # torch's
        session = self._slot.session
        watched = session.watched
        found = super().register_hook(hook)  # type: ignore[no-untyped-call]  # torch's, which looks at `grad_fn`
        session.watched, session.trace.watched = watched, True
        return found

    def retain_grad(self) -> None:
        """As torch's."""
        if type(self._slot) is Slot:
            self._slot.session.trace.watched = True
        super().retain_grad()

    # -- devices: torch would look for them on this machine -------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's. A device is one of the worker's: `x.to("cuda")` works where the caller has none.

        On this side a pointer's `device` stays what it was: it says nothing of the worker's hardware."""
        device, args, kwargs = _device_of(args, kwargs)
        if device is None or device.type == "cpu":
            return super().to(*args, **kwargs) if args or kwargs else self
        moved = torch.ops.aten._to_copy.default(self, device=device)
        return moved.to(*args, **kwargs) if args or kwargs else moved

    def cuda(self, device: Any = None, non_blocking: bool = False, memory_format: Any = None) -> Any:
        """`.to("cuda")`: the worker's."""
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device or "cuda")

    # -- the rest of what torch.Tensor does by touching memory --------------------------------------------

    @property
    def data(self) -> Any:
        """As torch's: the same value, outside autograd. Assigning makes this pointer point there."""
        return self.detach()

    @data.setter
    def data(self, other: Any) -> None:
        if not isinstance(other, PointerTensor) or other._slot.session is not self._slot.session:
            raise UsageError(f".data of a tensor at '{self.location.id}' takes a pointer to that worker; .send() it")
        self._slot.session.trace.watched = True  # what a graph has saved of it is another value now
        torch.Tensor.data.__set__(self, other.detach())  # type: ignore[attr-defined]  # a getset descriptor
        self._slot = other._slot

    def tolist(self) -> Any:
        """The value as nested lists; one round trip."""
        return self.detach().copy().get().tolist()  # type: ignore[attr-defined]  # a pointer

    def numpy(self, *, force: bool = False) -> Any:
        """Always an error unless forced: numpy needs the memory, and that is at the worker."""
        if force:
            return self.detach().copy().get().numpy()  # type: ignore[attr-defined]  # a pointer
        raise UsageError(f"numpy cannot read a tensor at '{self.location.id}': call .get() first")

    def _no_memory(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Always an error: the memory is at the worker."""
        raise UsageError(f"a tensor at '{self.location.id}' has no memory here: call .get() first")

    share_memory_ = data_ptr = storage = untyped_storage = apply_ = map_ = map2_ = _no_memory
    __dlpack__ = __dlpack_device__ = pin_memory = is_pinned = _no_memory

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> PointerTensor:
        if not self.is_leaf:
            raise RuntimeError("only leaves can be copied with deepcopy; use .detach() or .copy()")
        clone = self.detach().copy().requires_grad_(self.requires_grad)  # type: ignore[attr-defined]  # a pointer
        if getattr(self, "_is_param", False):
            clone._is_param = True
        memo[id(self)] = clone
        if self.grad is not None and not getattr(self, "_is_param", False):  # a parameter's stays behind, as in torch
            clone.grad = self.grad.__deepcopy__(memo)
        return clone  # type: ignore[no-any-return]  # as above

    def __reduce_ex__(self, proto: Any) -> NoReturn:
        raise UsageError(
            f"a pointer to '{self.location.id}' cannot be saved or pickled: call .get() first, on the module, or on "
            "the optimizer for its state"
        )

    def __format__(self, format_spec: str) -> str:
        if not format_spec:
            return repr(self)
        return format(self.item(), format_spec)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch types its own so
        slot = self._slot
        if isinstance(slot, Spent):
            return "(Wrapper)>[PointerTensor | spent]"
        return f"(Wrapper)>[PointerTensor | me:{self.id} -> {slot.session.location.id}:{slot.id}]"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        if isinstance(self._slot, Spent):
            return f"<code>{self!r}</code>"
        shape = " × ".join(map(str, self.shape)) or "scalar"
        grad = ", requires grad" if self.requires_grad else ""
        return f"<code>{self!r}</code><br><small>{shape}, {self.dtype}{grad}; the value is at the worker</small>"


for _name in in_place.NAMES:
    setattr(PointerTensor, _name, in_place.writing(PointerTensor, _name))


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.device | None, tuple[Any, ...], Any]:
    """The device among the arguments of `.to(device, dtype, non_blocking, copy)`, and the arguments without it."""
    named = dict(zip(("device", "dtype", "non_blocking", "copy"), args, strict=False)) | kwargs
    given = named.pop("device", None)
    if not isinstance(given, str | int | torch.device) or isinstance(given, bool):
        return None, args, kwargs
    device = torch.device("cuda", given) if isinstance(given, int) else torch.device(given)
    rest = {name: value for name, value in named.items() if name != "non_blocking" and value not in (None, False)}
    return device, (), rest


def is_at(pointer: PointerTensor, session: Session) -> bool:
    """Whether a pointer is to a value of this session; one that is spent is to none."""
    return not isinstance(pointer._slot, Spent) and pointer._slot.session is session


def spend(pointer: PointerTensor, taken_by: str) -> None:
    """Let go of the slot for good; what is done with the pointer from now on is an error that says so."""
    pointer._slot = Spent(pointer._slot, taken_by)  # type: ignore[assignment]  # stands in for a slot to raise


def send(tensor: torch.Tensor, location: Any) -> PointerTensor:
    """Send a copy of a local tensor to a worker. A leaf's gradient goes with it.

    A tensor that was computed with autograd is refused: its graph does not cross to the worker."""
    if not isinstance(tensor, torch.Tensor):
        raise UsageError(f"only tensors can be sent, found a {type(tensor).__name__}: torch.as_tensor(it) makes one")
    if isinstance(tensor, PointerTensor):
        tensor.send(location)
    session = session_of(location)
    session.check_open()
    pointer = sent(session, tensor, None)
    session.relieve()
    return pointer


_TRAVEL = frozenset(DTYPES[name] for name in ITEM_BYTES if name in DTYPES)


def check_travels(tensor: torch.Tensor) -> None:
    """Raise `UsageError` for a tensor that cannot be sent."""
    if tensor.layout is not torch.strided:
        raise UsageError(f"a tensor of layout {tensor.layout} cannot be sent: call .to_dense() first")
    if tensor.dtype not in _TRAVEL:
        raise UsageError(f"a tensor of {tensor.dtype} cannot be sent: convert it first, with .to(dtype)")
    if tensor.is_meta:
        raise UsageError("a tensor on the device 'meta' has no values to send: make it anew, with .to_empty() or zeros")
    if tensor.requires_grad and not tensor.is_leaf:
        raise UsageError(
            "this tensor was computed, and autograd does not cross to a worker: send its inputs, or detach it"
        )


def sent(session: Session, tensor: torch.Tensor, site: Site | None) -> PointerTensor:
    """`send` for a known session, issued at a known line."""
    tensor = at_hand(tensor)
    check_travels(tensor)
    pointer: PointerTensor = point(PointerTensor, session.put(tensor, site))
    if tensor.requires_grad:
        pointer.requires_grad_()
        grad = tensor.grad
        if grad is not None:
            pointer.grad = grad if isinstance(grad, PointerTensor) else sent(session, grad, site)
    return pointer


def session_of(location: Any) -> Session:
    """The session of a worker, as found on what users hold."""
    session = getattr(location, "session", None)
    if not isinstance(session, Session):
        raise UsageError(f"expected a worker, such as VirtualWorker(id='clinic'), found {type(location).__name__}")
    return session


def sessions_of(tensors: Iterable[torch.Tensor]) -> set[Session]:
    """The sessions that these tensors live in; local ones have none."""
    return {tensor._slot.session for tensor in tensors if isinstance(tensor, PointerTensor)}
