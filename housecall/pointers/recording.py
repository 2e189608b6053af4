"""One recording: a function run once on pointers without values, and what it did as a program and its effects.

What must live here: how objects are lent to a tape and given back, and how what happened there becomes a `Recording`.
What must not: workers, runs, which recording is wanted when (`record`).

NOTE [What is an input]
The tensors among the arguments, the parameters and buffers of modules among them or named by the function, gradients
that are there before, and the state of every optimizer that steps. While the function runs each of these objects holds
a pointer of the tape (as `torch.utils.swap_tensors` does it), so whoever refers to the object, an optimizer say, sees
that pointer; afterwards each holds again what it held.

NOTE [What a run changes]
Writes in place are kept as such: the program says which of its inputs it updates. Gradients and optimizer state that
the function made are outputs, and have their places. What the function did to other objects of Python it did once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer
from torch.utils._pytree import TreeSpec, tree_flatten

from ..errors import PlaceError, UsageError
from ..program.call import HOLE, Input, Program, refs, replaced
from ..program.check import check
from ..program.flow import with_updates
from ..program.ops import operator
from ..program.outcome import Spec, spec
from ..program.typing import meta, type_of
from ..types import Ref, TensorType
from .adapted import adapt, restore
from .optimizer import check_recordable
from .site import Site, is_callers
from .tape import Tape
from .tensor import PointerTensor

__all__ = ["Effect", "Given", "Place", "Plain", "Recording", "recording_of", "settings_of", "spec_of", "state_of"]


class Given:
    """The arguments of one call: `leaves` are its tensors, each once; `parts`, all else that decides what is said."""

    def __init__(self) -> None:
        self.leaves: list[torch.Tensor] = []
        self.names: list[str] = []
        self.parts: list[Any] = []
        self.modules: list[nn.Module] = []
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self._seen: dict[int, int] = {}

    def add(self, name: str, value: Any) -> Any:
        """Take an argument in; what the function is given for it."""
        if isinstance(value, torch.Tensor):
            self._leaf(name, value)
        elif isinstance(value, TensorType):
            value = meta(value)
            self._leaf(name, value)
        elif isinstance(value, nn.Module):
            self.modules.append(value)
            self.parts.append(nn.Module)
            self._module(name, value)
        elif isinstance(value, list | tuple):
            self.parts.append((type(value), len(value)))
            items = [self.add(f"{name}[{at}]", item) for at, item in enumerate(value)]
            value = items if type(value) is list else tuple(items) if type(value) is tuple else type(value)(*items)
        elif isinstance(value, dict):
            self.parts.append((dict, *value))
            value = {key: self.add(f"{name}{_entry(key)}", item) for key, item in value.items()}
        else:
            self._plain(name, value)
        return value

    def _plain(self, name: str, value: Any) -> None:
        try:
            hash(value)
        except TypeError:
            raise UsageError(
                f"argument '{name}' is a {type(value).__name__}; a recorded function takes tensors, modules, plain "
                "values, and lists, tuples and dicts of these"
            ) from None
        self.parts.append((type(value), value))

    def _module(self, name: str, module: nn.Module) -> None:
        self.parts.append(module.training)
        for holder in (module._parameters, module._buffers):
            for own, tensor in holder.items():
                if tensor is not None:
                    self._leaf(f"{name}.{own}", tensor)
        for own, child in module._modules.items():
            if child is not None:
                self._module(f"{name}.{own}", child)

    def _leaf(self, name: str, tensor: torch.Tensor) -> None:
        at = self._seen.setdefault(id(tensor), len(self.leaves))
        if at == len(self.leaves):
            self.leaves.append(tensor)
            self.names.append(name)
        else:  # the same object once more: it must be so again
            self.parts.append(at)


def _entry(key: Any) -> str:
    """What an entry of a dict is called after its dict: as an attribute would be if it can be, for owners to read."""
    return f".{key}" if type(key) is str and key.isidentifier() and key.isascii() else f"[{key!r}]"


def spec_of(tensor: torch.Tensor) -> Spec:
    """The type of a tensor at a worker: where it is, or where it would be sent."""
    if isinstance(tensor, PointerTensor):
        return tensor._slot.spec
    if tensor.layout is not torch.strided:
        raise UsageError(f"a tensor of layout {tensor.layout} cannot be recorded: call .to_dense() first")
    found = type_of(tensor.detach())
    if not (found.conj or found.neg):
        found = type_of(torch.empty_like(tensor, device="meta"))
    return spec(TensorType(found.dtype, found.shape, found.stride, 0, "cpu", found.conj, found.neg))


def settings_of(optimizers: Iterable[torch.optim.Optimizer]) -> tuple[Any, ...]:
    """What the optimizers' groups say besides their parameters: learning rates and the like."""
    return tuple(
        [
            (name, value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 else _hashable(value))
            for optimizer in optimizers
            for group in optimizer.param_groups
            for name, value in group.items()
            if name != "params"
        ]
    )


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def state_of(optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
    """Which state an optimizer keeps, and of what types: not its values."""
    found: list[Any] = []
    for group in optimizer.param_groups:
        for at, parameter in enumerate(group["params"]):
            for name, value in optimizer.state.get(parameter, {}).items():
                found.append((at, name, spec_of(value) if _is_remote(value) else type(value)))
    return tuple(found)


def _is_remote(value: Any) -> bool:
    """Whether this is state that belongs at the worker. Numbers stay here: optimizers read them."""
    return isinstance(value, torch.Tensor) and (value.dim() > 0 or isinstance(value, PointerTensor))


class Place(NamedTuple):
    """Where a pointer is found, or put: a leaf itself, its gradient, or an entry of an optimizer's state."""

    kind: Literal["leaf", "grad", "state"]
    leaf: int = -1
    optimizer: Any = None
    parameter: Any = None
    name: str = ""


class Plain(NamedTuple):
    """What stays at home as it is: no pointer."""

    value: Any


class Effect(NamedTuple):
    """What a run does at one place beside writing in place: puts output `out` there, of type `spec`; or, where `out` is
    `None`, takes away what is there or puts the `local` value."""

    place: Place
    out: int | None
    spec: Spec | None = None
    local: Plain | None = None


class Recording(NamedTuple):
    """A program, and what it has to do with the objects that it was recorded on.

    `sources`: where the slots of its inputs are found. `effects`: what a run puts where. `results`: for each leaf of
    what the function returned its output, the leaf that it is, or a plain value; `outs`: the outputs' types. `counts`:
    whether an optimizer keeps count of its steps here; `begins`: whether it made state that was not there."""

    program: Program
    sources: tuple[Place, ...]
    effects: tuple[Effect, ...]
    results: tuple[int | Place | Plain, ...]
    outs: tuple[Spec, ...]
    structure: TreeSpec
    settings: tuple[Any, ...]
    optimizers: tuple[torch.optim.Optimizer, ...]
    draws: int
    counts: bool
    begins: bool


def recording_of(fn: Callable[..., Any], given: Given) -> Recording:
    """Run `fn` on the arguments with pointers of a tape in their places. Raises `UsageError` where it cannot be
    recorded; whatever happens, every object holds afterwards what it held before."""
    tape = Tape()
    loan = _Loan(tape, given)
    with loan.taken():
        try:
            result = fn(*given.args, **given.kwargs)
        except PlaceError as error:
            raise _explained(error, tape) from None
        return _Harvest(loan, result).recording()


# -- lending objects to a tape ----------------------------------------------------------------------------


class _Loan:
    """What a tape has borrowed, and what it was before."""

    def __init__(self, tape: Tape, given: Given) -> None:
        self.tape, self.given = tape, given
        self.places: dict[int, Place] = {}  # id on the tape -> the place that it stands for
        self.stands: dict[Place, PointerTensor] = {}
        self.types: dict[Place, Spec] = {}
        self.holders: list[tuple[dict[str, Any], dict[str, Any]]] = []  # a module's own, and what it held before
        self.optimizers: list[torch.optim.Optimizer] = []
        self.settings: tuple[Any, ...] = ()
        self.states: list[tuple[torch.optim.Optimizer, torch.Tensor, dict[str, Any]]] = []
        self._leaves = {id(leaf): at for at, leaf in enumerate(given.leaves)}

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within: every leaf is a pointer of the tape, and so is the state of optimizers that step."""
        stands = [self._stand(at, leaf) for at, leaf in enumerate(self.given.leaves)]
        with ExitStack() as stack:
            parts = [part for module in self.given.modules for part in module.modules()]
            self.holders = [(holder, dict(holder)) for part in parts for holder in (part._parameters, part._buffers)]
            for holder, before in self.holders:
                stack.callback(holder.update, before)
            adapt(parts)
            stack.callback(restore, parts)
            for leaf, stand in zip(self.given.leaves, stands, strict=True):
                _swap(leaf, stand)
                stack.callback(_swap, leaf, stand)
            stack.callback(self._restore_states)
            hook = torch_optimizer.register_optimizer_step_pre_hook(self._adopt)
            stack.callback(hook.remove)
            # First of all such hooks: ours that brings strays would look for state at the tape.
            torch_optimizer._global_optimizer_pre_hooks.move_to_end(hook.id, last=False)  # type: ignore[attr-defined]  # it is an OrderedDict
            yield

    def _stand(self, at: int, leaf: torch.Tensor) -> PointerTensor:
        name = self.given.names[at]
        if leaf._backward_hooks or getattr(leaf, "_post_accumulate_grad_hooks", None):
            raise UsageError(f"'{name}' has hooks, which would not run at the worker: remove them first")
        stand = self._lend(Place("leaf", at), leaf)
        if not leaf.requires_grad:
            return stand
        if not leaf.is_leaf:
            raise UsageError(f"'{name}' was computed, and autograd does not reach into a program: detach it")
        stand.requires_grad_()
        if isinstance(leaf, nn.Parameter):
            stand._is_param = True
        if leaf.grad is not None:
            stand.grad = self._lend(Place("grad", at), leaf.grad)
        return stand

    def _lend(self, place: Place, tensor: torch.Tensor) -> PointerTensor:
        given = spec_of(tensor)
        stand = self.tape.stand_in(given.type)
        self.places[stand._slot.id], self.stands[place], self.types[place] = place, stand, given
        return stand

    def _adopt(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if any(optimizer is known for known in self.optimizers):
            return
        check_recordable(optimizer)
        self.optimizers.append(optimizer)
        self.settings += settings_of([optimizer])
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                self.states.append((optimizer, parameter, dict(state)))
                for name, value in state.items():
                    state[name] = self._lent_state(optimizer, parameter, name, value)

    def _lent_state(self, optimizer: Any, parameter: torch.Tensor, name: str, value: Any) -> Any:
        if isinstance(value, list | dict | tuple):
            raise UsageError(f"{type(optimizer).__name__} keeps {name!r} in a {type(value).__name__}: not recorded yet")
        if not _is_remote(value):
            return value.clone() if isinstance(value, torch.Tensor) else value
        at = self._leaves.get(id(parameter), -1)
        if at < 0:
            raise UsageError(
                f"{type(optimizer).__name__} steps a parameter that is no argument's, of shape "
                f"{tuple(parameter.shape)}: pass its module to the function"
            )
        return self._lend(Place("state", at, optimizer, parameter, name), value)

    def state_place(self, optimizer: Any, parameter: torch.Tensor, name: str) -> Place:
        """The place of an entry of state."""
        return Place("state", self._leaves.get(id(parameter), -1), optimizer, parameter, name)

    def name_of(self, place: Place) -> str:
        """What a place is called in the program."""
        name = self.given.names[place.leaf]
        return {"leaf": name, "grad": f"{name}.grad", "state": f"{name}.{place.name}"}[place.kind]

    def moved(self) -> Iterator[tuple[int, Any]]:
        """Leaves in whose place the function put something else, and what."""
        for holder, before in self.holders:
            for name, tensor in before.items():
                if holder.get(name) is not tensor:
                    yield self._leaves[id(tensor)], holder.get(name)
        for at, leaf in enumerate(self.given.leaves):
            if self.places.get(leaf._slot.id) != Place("leaf", at):  # type: ignore[attr-defined]  # on loan it is a pointer
                yield at, leaf

    def _restore_states(self) -> None:
        for optimizer, parameter, before in self.states:
            state = optimizer.state.get(parameter)
            if state is not None:
                state.clear()
                state.update(before)
                if not before:
                    del optimizer.state[parameter]


def _swap(one: torch.Tensor, other: torch.Tensor) -> None:
    """Exchange all that two tensors hold; both objects stay. As `torch.utils.swap_tensors`, but with weak references,
    which recurrent modules keep to their own weights."""
    torch._C._swap_tensor_impl(one, other)
    one.__class__, other.__class__ = other.__class__, one.__class__
    one.__dict__, other.__dict__ = other.__dict__, one.__dict__


def _explained(error: PlaceError, tape: Tape) -> UsageError:
    """A tensor that is no argument met one that is: which, and at which line."""
    found, frames = error.__traceback__, []
    while found is not None:
        if is_callers(found.tb_frame.f_code.co_filename):
            frames.append((found.tb_frame, found.tb_lasti))
        found = found.tb_next
    if not frames:
        return UsageError(str(error))
    frame, instruction = frames[-1]
    names = ", ".join(f"'{name}'" for name in _strangers(frame, tape)) or "a tensor"
    return UsageError(
        f"{names} is no argument of the recorded function, nor of a module that it names, at "
        f"{Site(frame.f_code, instruction)}. Make it an argument, so that it becomes an input of the program"
    )


def _strangers(frame: FrameType, tape: Tape) -> list[str]:
    """The names in a frame's code that mean tensors which are not on the tape."""
    code = frame.f_code
    known = {**frame.f_globals, **frame.f_locals}
    known.update(
        {name: value for name, value in getattr(known.get("self"), "__dict__", {}).items() if name not in known}
    )
    wanted = {*code.co_names, *code.co_varnames, *code.co_freevars}
    return sorted(
        name
        for name, value in known.items()
        if name in wanted
        and isinstance(value, torch.Tensor)
        and not (isinstance(value, PointerTensor) and value._slot.session is tape)
        and (value.dim() or isinstance(value, PointerTensor))
    )


# -- what happened ----------------------------------------------------------------------------------------


class _Harvest:
    """A tape after the function has run on it, while the objects are still on loan."""

    def __init__(self, loan: _Loan, result: Any) -> None:
        self._loan, self._given = loan, loan.given
        self._results, self._structure = tree_flatten(result)
        self._calls = loan.tape.calls()
        self._outs: dict[int, tuple[int, str]] = {}  # id on the tape -> which output, and its name
        self._specs: list[Spec] = []  # of the outputs
        self._counts = self._begins = False
        if loan.settings != settings_of(loan.optimizers):
            raise UsageError(
                "the function changes an optimizer's settings (a scheduler's step?), which a program cannot: do that "
                "outside, before or after the call"
            )

    def recording(self) -> Recording:
        """All of it."""
        results = tuple([self._result(at, leaf) for at, leaf in enumerate(self._results)])
        effects = (*self._moved(), *self._grads(), *self._states())
        program, sources = self._program()
        draws = sum(operator(call.op).random for call in self._calls)
        loan = self._loan
        return Recording(
            program, sources, effects, results, tuple(self._specs), self._structure, loan.settings,
            tuple(loan.optimizers), draws, self._counts, self._begins,
        )  # fmt: skip

    # -- outputs ------------------------------------------------------------------------------------------

    def _is_ours(self, value: Any) -> bool:
        return isinstance(value, PointerTensor) and value._slot.session is self._loan.tape

    def _out(self, pointer: Any, name: str) -> int:
        """The number of the output that a pointer is."""
        slot = pointer._slot
        if slot.id not in self._outs:
            self._outs[slot.id] = len(self._outs), name
            self._specs.append(slot.spec)
        return self._outs[slot.id][0]

    def _result(self, at: int, leaf: Any) -> Any:
        if not self._is_ours(leaf):
            if isinstance(leaf, PointerTensor):
                raise UsageError("the function returns a pointer that it was not given: make it an argument")
            return Plain(leaf)
        for index, own in enumerate(self._given.leaves):
            if own is leaf:
                return Place("leaf", index)
        return self._out(leaf, "result" if len(self._results) == 1 else f"result[{at}]")

    def _moved(self) -> Iterator[Effect]:
        for at, now in self._loan.moved():
            place = Place("leaf", at)
            if not self._is_ours(now) or now._slot.spec is not self._loan.types[place]:
                raise UsageError(
                    f"the function puts another shape or kind of tensor in the place of '{self._given.names[at]}': "
                    "return the new one instead"
                )
            yield Effect(place, self._out(now, self._loan.name_of(place)), now._slot.spec)

    def _grads(self) -> Iterator[Effect]:
        for at, leaf in enumerate(self._given.leaves):
            place = Place("grad", at)
            grad: Any = leaf.grad if leaf.requires_grad and leaf.is_leaf else None
            if grad is None:
                if place in self._loan.stands:
                    yield Effect(place, None)
            elif self._loan.places.get(grad._slot.id) != place:
                yield Effect(place, self._out(grad, self._loan.name_of(place)), grad._slot.spec)

    def _states(self) -> Iterator[Effect]:
        for optimizer, parameter, before in self._loan.states:
            state = optimizer.state.get(parameter, {})
            for name in before.keys() - state.keys():
                yield Effect(self._loan.state_place(optimizer, parameter, name), None)
            for name, value in state.items():
                yield from self._state(self._loan.state_place(optimizer, parameter, name), before, value)

    def _state(self, place: Place, before: dict[str, Any], value: Any) -> Iterator[Effect]:
        is_new = place.name not in before
        if self._is_ours(value):
            if self._loan.places.get(value._slot.id) != place:
                self._begins |= is_new
                yield Effect(place, self._out(value, self._loan.name_of(place)), value._slot.spec)
        elif is_new or not _same(before[place.name], value):
            if _is_remote(value) or isinstance(value, list | dict):
                raise UsageError(f"{type(place.optimizer).__name__} keeps {place.name!r} here: it cannot be recorded")
            self._begins |= is_new
            self._counts |= value is not None
            yield Effect(place, None, None, Plain(value.clone() if isinstance(value, torch.Tensor) else value))

    # -- the program --------------------------------------------------------------------------------------

    def _program(self) -> tuple[Program, tuple[Place, ...]]:
        """The calls with ids that count from 1: inputs (leaves, gradients, state), then what is bound."""
        loan = self._loan
        made = {out for call in self._calls for out in call.outs}
        read = {ref for call in self._calls for arg in (*call.args, *call.kwargs.values()) for ref in refs(arg)}
        read |= self._outs.keys()
        strangers = read - made - loan.places.keys()
        if strangers:
            raise UsageError("the function uses a pointer of another recording: make it an argument")
        inputs = [ref for ref in loan.places if ref in read]
        order = {"leaf": 0, "grad": 1, "state": 2}
        inputs.sort(key=lambda ref: (order[loan.places[ref].kind], loan.places[ref].leaf, loan.places[ref].name))
        ids = {HOLE: HOLE} | {ref: number for number, ref in enumerate(inputs, 1)}
        for call in self._calls:
            for out in call.outs:
                ids.setdefault(out, len(ids))
        sources = tuple([loan.places[ref] for ref in inputs])
        given = tuple(
            [
                Input(loan.name_of(place), ids[ref], loan.types[place].type)
                for ref, place in zip(inputs, sources, strict=True)
            ]
        )
        calls = tuple(
            [
                replaced(call, lambda ref: Ref(ids[ref.id]), tuple([ids[out] for out in call.outs]))
                for call in self._calls
            ]
        )
        program = with_updates(
            Program(given, calls, tuple([(name, ids[ref]) for ref, (_, name) in self._outs.items()]))
        )
        check(program)
        return program, sources


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return bool(torch.equal(one, other))
    return type(one) is type(other) and bool(one == other)
