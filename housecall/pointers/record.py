"""Programs by hand: run a function once on pointers without values, keep what it did, and run that anywhere.

    step = hc.record(train, model, x, y)        # nothing is computed
    print(step)                                 # the program: what an owner reads
    loss = step(model, x, y)                    # one message, at whichever worker they are

What must live here: which recording serves a call, and how it is run. How one is made is `recording`'s.

NOTE [What is read once]
Everything in Python: numbers, flags, the function's own code. A run looks whether the types of its tensors, the plain
arguments, `training` of the modules and the optimizers' state and settings are those of a recording; if not, it records
anew. Numbers that an optimizer makes of its settings or of its own count of steps (a learning rate, Adam's bias
correction) become numbers of the program, given anew with each run, as soon as they are seen to change.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_unflatten

from ..errors import PlaceError, ProgramError, UsageError
from ..program.call import Arg, Call, Program
from ..program.check import check
from ..program.files import save_program
from ..program.forecast import type_program
from ..program.ops import operator
from ..program.outcome import Spec, spec
from ..types import Ref
from ..wire.messages import Run
from .calls import point
from .data import FederatedDataset
from .mock import MockDataset
from .optimizer import follow
from .recording import Effect, Given, Place, Plain, Recording, recording_of, settings_of, spec_of, state_of
from .request import OwnersAnswer, ask_to_run
from .slot import Slot
from .tensor import PointerTensor

__all__ = ["Recorded", "record", "run_program", "submit_program"]

_MOST = 256  # recordings of one function: beyond, the oldest is forgotten
_Where = tuple[int, int | str]  # a call's number, and which of its arguments


def record(fn: Callable[..., Any], *examples: Any) -> Recorded:
    """Record the pointer operations of `fn`, run once on `examples`: pointers, mocks, local tensors, tensors on the
    device "meta", `TensorType`s, modules, plain values, and lists, tuples and dicts of these. A data set of one worker,
    or a mock, is given to it as one batch of all its records. Nothing is computed, and the examples are afterwards what
    they were.

    Raises `UsageError` where the function needs a value, with the line; and for a tensor that is no argument."""
    recorded = Recorded(fn)
    recorded.prepare(*examples)
    return recorded


class Recorded:
    """A function as programs, one for each combination of types that it is given. Call it with pointers to run it: it
    does what the function does, in one message. What it returns are values, without a graph behind them."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self._names = _parameter_names(fn)
        self._modules = _captured_modules(fn)
        self._optimizers: list[torch.optim.Optimizer] = []
        self._variants: dict[tuple[Any, ...], _Variant] = {}
        self._latest: _Variant | None = None

    @property
    def program(self) -> Program:
        """The program that was recorded or run last."""
        if self._latest is None:
            raise UsageError("nothing is recorded yet: call .prepare() with examples")
        return self._latest.program

    @property
    def programs(self) -> tuple[Program, ...]:
        """All programs so far, in the order of recording."""
        return tuple({variant.digest: variant.program for variant in self._variants.values()}.values())

    @property
    def digest(self) -> str:
        """The digest of `program`: what an owner approves."""
        return self.program.digest

    def save(self, path: str | Path) -> None:
        """Write `program` to a file, for `load_program`."""
        save_program(self.program, path)

    def __str__(self) -> str:
        return str(self.program)

    def __repr__(self) -> str:
        return (
            f"<recorded {getattr(self.fn, '__qualname__', type(self.fn).__name__)}: {len(self._variants)} recordings>"
        )

    def prepare(self, *args: Any, **kwargs: Any) -> Program:
        """The program for arguments of these types, recorded now if it was not before. Nothing runs."""
        self._latest = self._variant(self._given(args, kwargs))
        return self._latest.program

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on pointers, and on modules at their worker. Parameters, buffers, gradients and optimizer state are
        afterwards as if the function had been called. Raises `UsageError` for tensors that are not at one worker."""
        given = self._given(args, kwargs)
        variant = self._latest = self._variant(given)
        return _run_recording(variant, given)

    def submit(self, *args: Any, reason: str, runs: int = 1, **kwargs: Any) -> OwnersAnswer:
        """Ask the owner of the data among these arguments to let this run on them, `runs` times: she reads the program,
        and which of her columns are its inputs. Nothing runs. Once she approves, call it with the same arguments.

        Raises `UsageError` as a call does, and `PolicyError` if no approval could permit it."""
        given = self._given(args, kwargs)
        variant = self._latest = self._variant(given)
        slots = _slots(variant.recording, given)
        return ask_to_run(slots[0].session, variant.program, variant.digest, slots, reason, runs)

    def bound(self, *args: Any, **kwargs: Any) -> tuple[Program, list[torch.Tensor]]:
        """The program for these arguments, and which tensor among them each of its inputs is. Nothing runs."""
        given = self._given(args, kwargs)
        variant = self._latest = self._variant(given)
        return variant.program, [_pointer(place, given) for place in variant.recording.sources]

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
        given = Given()
        given.args = tuple([given.add(self._names(at), _records(arg)) for at, arg in enumerate(args)])
        if kwargs:
            given.parts.append(tuple(kwargs))
            given.kwargs = {name: given.add(name, _records(arg)) for name, arg in kwargs.items()}
        for name, module in self._modules:
            given.add(name, module)
        return given

    def _key(self, given: Given) -> tuple[Any, ...]:
        """What decides which recording serves."""
        key = [*given.parts, torch.is_grad_enabled()]
        for leaf in given.leaves:
            key.append(leaf._slot.spec if type(leaf) is PointerTensor else spec_of(leaf))
            if leaf.requires_grad:
                grad = leaf.grad if leaf.is_leaf else None
                key.append(grad if grad is None else spec_of(grad))
        for optimizer in self._optimizers:
            if optimizer.state:
                key.append(state_of(optimizer))
        return tuple(key)

    def _variant(self, given: Given) -> _Variant:
        variant = self._variants.get(self._key(given))
        if variant is not None and not variant.recording.counts and variant.is_current():
            return variant
        fresh = recording_of(self.fn, given)
        if variant is not None and variant.renew(fresh):
            return variant
        return self._new(fresh, given)

    def _new(self, fresh: Recording, given: Given) -> _Variant:
        """Keep a recording. If an optimizer counts its steps, record the next step too: what differs is a number."""
        for optimizer in fresh.optimizers:
            if not any(optimizer is known for known in self._optimizers):
                self._optimizers.append(optimizer)
        variant = _Variant(fresh)
        if fresh.counts and not fresh.begins:
            with _counted(fresh):
                second = recording_of(self.fn, given)
            if variant.renew(second):
                variant.renew(fresh)
        if len(self._variants) >= _MOST:
            del self._variants[next(iter(self._variants))]
        self._variants[self._key(given)] = variant
        return variant


# -- one recording, renewed as numbers change ---------------------------------------------------------------


class _Variant:
    """A recording whose program may have numbers. `groups` says where they stand: places with one index are given the
    same number."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.base = self.program = recording.program  # `base` has constants where `program` has numbers
        self.digest = self.program.digest
        self.numbers: tuple[float, ...] = ()
        self.groups: dict[_Where, int] = {}

    def is_current(self) -> bool:
        """Whether the optimizers' settings are what they were."""
        return self.recording.settings == settings_of(self.recording.optimizers)

    def renew(self, fresh: Recording) -> bool:
        """Go on with a recording of a later time. False, and nothing changed, if it differs by more than numbers."""
        varied = _differences(self.base, fresh.program)
        if varied is None:
            return False
        known = [*self.groups, *(where for where in varied if where not in self.groups)]
        found: dict[tuple[Any, ...], int] = {}
        groups: dict[_Where, int] = {}
        for where in known:
            now, before = _at(fresh.program, where), _at(self.base, where)
            kept = self.groups.get(where, repr(before))
            groups[where] = found.setdefault((kept, repr(now)), len(found))
        if groups != self.groups:
            try:
                program = _with_groups(self.base, groups)
            except ProgramError:  # a number that may not be one: it decides a shape
                return False
            self.program, self.digest, self.groups = program, program.digest, groups
        numbers = {index: _at(fresh.program, where) for where, index in groups.items()}
        self.numbers = tuple([numbers[index] for index in range(len(numbers))])
        self.recording = fresh
        return True


def _arguments(call: Call) -> Iterator[tuple[int | str, Arg]]:
    yield from enumerate(call.args)
    yield from call.kwargs.items()


def _at(program: Program, where: _Where) -> Any:
    number, which = where
    call = program.calls[number]
    return call.args[which] if isinstance(which, int) else call.kwargs[which]


def _differences(one: Program, other: Program) -> list[_Where] | None:
    """Where two programs have different floats; `None` if they differ in anything else."""
    if one.inputs != other.inputs or one.outputs != other.outputs or len(one.calls) != len(other.calls):
        return None
    found: list[_Where] = []
    for number, (here, there) in enumerate(zip(one.calls, other.calls, strict=True)):
        if here == there:
            continue
        if (here.op, here.outs, len(here.args), here.kwargs.keys()) != (
            there.op, there.outs, len(there.args), there.kwargs.keys(),
        ):  # fmt: skip
            return None
        for which, arg in _arguments(here):
            now = there.args[which] if isinstance(which, int) else there.kwargs[which]
            if type(arg) is float and type(now) is float:
                if repr(arg) != repr(now):
                    found.append((number, which))
            elif type(arg) is not type(now) or arg != now:
                return None
    return found


def _with_groups(base: Program, groups: dict[_Where, int]) -> Program:
    """The program with a number at each place of a group. Raises `ProgramError` where none may stand."""
    first = 1 + max([*(item.id for item in base.inputs), *(out for call in base.calls for out in call.outs)], default=0)
    calls = list(base.calls)
    names: dict[int, str] = {}
    for (number, which), index in groups.items():
        call = calls[number]
        ref = Ref(first + index)
        args = tuple([ref if at == which else arg for at, arg in enumerate(call.args)])
        calls[number] = Call(
            call.op, args, {name: ref if name == which else arg for name, arg in call.kwargs.items()}, call.outs
        )
        params = [param.name for param in operator(call.op).params if not param.keyword]
        names.setdefault(index, f"{which if isinstance(which, str) else params[which]}{index + 1}")
    program = Program(
        base.inputs, tuple(calls), base.outputs, tuple([(name, first + at) for at, name in sorted(names.items())])
    )
    check(program)
    return program


@contextmanager
def _counted(recording: Recording) -> Iterator[None]:
    """Within: optimizers count as if the recorded step had been taken."""
    before = [
        (effect, effect.place.optimizer.state[effect.place.parameter]) for effect in recording.effects if effect.local
    ]
    kept = [(state, effect.place.name, state[effect.place.name]) for effect, state in before]
    for effect, state in before:
        state[effect.place.name] = effect.local.value  # type: ignore[union-attr]  # those that have one
    try:
        yield
    finally:
        for state, name, value in kept:
            state[name] = value


# -- running ----------------------------------------------------------------------------------------------


def _run_recording(variant: _Variant, given: Given) -> Any:
    recording = variant.recording
    slots = _slots(recording, given)
    session = slots[0].session
    outs = [Slot(session, given_spec) for given_spec in recording.outs]
    for _ in range(recording.draws):
        session.seed()
    _send(variant.program, variant.digest, variant.numbers, slots, outs)
    for effect in recording.effects:
        _take_effect(effect, given, outs)
    results = [_result(item, given, outs) for item in recording.results]
    if recording.structure.is_leaf():
        return results[0]
    return tree_unflatten(results, recording.structure)


def _send(program: Program, digest: str, numbers: tuple[float, ...], slots: list[Slot], outs: list[Slot]) -> None:
    """Queue one run."""
    session = slots[0].session
    session.run(program, Run(digest, tuple([slot.id for slot in slots]), tuple([out.id for out in outs]), numbers))
    if session.synchronous:
        session.describe(outs)
    elif session.transport.remote:
        session.flush()  # a run is work for many calls: the worker begins now


def _slots(recording: Recording, given: Given) -> list[Slot]:
    """The slots of a recording's inputs, all of one session. What an optimizer keeps follows its parameters."""
    found = [_pointer(place, given) for place in recording.sources]
    slots = [pointer._slot for pointer in found if type(pointer) is PointerTensor]
    if not slots:
        raise UsageError("none of the tensors is at a worker: .send(worker) them, and the modules, before the call")
    session = slots[0].session
    if len(slots) == len(found) and all(slot.session is session for slot in slots):
        return slots
    for optimizer in recording.optimizers:
        follow(optimizer)
    slots = []
    for place, item in zip(recording.sources, recording.program.inputs, strict=True):
        pointer = _pointer(place, given)
        if type(pointer) is not PointerTensor or pointer._slot.session is not session:
            where = f"at '{pointer.location.id}'" if isinstance(pointer, PointerTensor) else "here"
            raise PlaceError(f"'{item.name}' is {where}, and others are at '{session.location.id}': .send() it there")
        slots.append(pointer._slot)
    return slots


def _pointer(place: Place, given: Given) -> Any:
    if place.kind == "leaf":
        return given.leaves[place.leaf]
    if place.kind == "grad":
        return given.leaves[place.leaf].grad
    return place.optimizer.state[place.parameter][place.name]


def _take_effect(effect: Effect, given: Given, outs: list[Slot]) -> None:
    place = effect.place
    leaf: Any = given.leaves[place.leaf]
    if place.kind == "grad" and effect.out is not None and _is_ours_alone(leaf.grad, effect.spec):
        leaf.grad._slot = outs[effect.out]
        return
    value = None if effect.out is None else point(PointerTensor, outs[effect.out])
    if place.kind == "grad":
        leaf.grad = value
    elif place.kind == "leaf":
        leaf._slot = outs[effect.out]  # type: ignore[index]  # a leaf's is an output
    else:
        _keep(place.optimizer.state[place.parameter], place.name, effect, value)


def _is_ours_alone(grad: Any, type_: Spec | None) -> bool:
    """Whether a gradient is a pointer of this type that nobody holds but its leaf: then it may point elsewhere, which
    costs less than a new one. Counted are `grad` here, getrefcount's argument, and torch's tensor."""
    return (
        type(grad) is PointerTensor
        and grad._slot.spec is type_
        and sys.getrefcount(grad) == 3
        and grad._use_count() == 2  # type: ignore[attr-defined]  # torch's own
    )


def _keep(state: dict[str, Any], name: str, effect: Effect, value: PointerTensor | None) -> None:
    """Put a new entry of an optimizer's state. Its own counters stay the objects that they are."""
    if value is not None:
        state[name] = value
    elif effect.local is None:
        state.pop(name, None)
    elif isinstance(state.get(name), torch.Tensor) and isinstance(effect.local.value, torch.Tensor):
        state[name].copy_(effect.local.value)
    else:
        local = effect.local.value
        state[name] = local.clone() if isinstance(local, torch.Tensor) else local


def _result(item: Any, given: Given, outs: list[Slot]) -> Any:
    if isinstance(item, Plain):
        return item.value
    if isinstance(item, Place):
        return given.leaves[item.leaf]
    return point(PointerTensor, outs[item])


def run_program(
    program: Program, inputs: Mapping[str, PointerTensor], numbers: Mapping[str, float] | None = None
) -> dict[str, PointerTensor]:
    """Run a program, as `load_program` gave it, on pointers by name; its outputs by name. Inputs that it updates are
    changed in place. Raises `UsageError` for what is missing or has another type, `PlaceError` for two places."""
    numbers = numbers or {}
    slots = _slots_by_name(program, inputs, numbers.keys())
    types = type_program(program)
    session = slots[0].session
    for _ in range(sum(operator(call.op).random for call in program.calls)):
        session.seed()
    outs = [Slot(session, spec(types[name])) for name, _ in program.outputs]
    _send(program, program.digest, tuple([float(numbers[name]) for name, _ in program.numbers]), slots, outs)
    return {name: point(PointerTensor, out) for (name, _), out in zip(program.outputs, outs, strict=True)}


def submit_program(
    program: Program, inputs: Mapping[str, PointerTensor], *, reason: str, runs: int = 1
) -> OwnersAnswer:
    """Ask the owner of the data among these inputs to let a program run on them, `runs` times: `Recorded.submit` for
    one that `load_program` gave. Raises as `run_program` does, and `PolicyError` if no approval could permit it."""
    slots = _slots_by_name(program, inputs, [name for name, _ in program.numbers])
    return ask_to_run(slots[0].session, program, program.digest, slots, reason, runs)


def _slots_by_name(program: Program, inputs: Mapping[str, PointerTensor], numbers: Iterable[str]) -> list[Slot]:
    """The slots of a program's inputs, in their order, all of one session."""
    given = inputs.keys() | set(numbers)
    wanted = {*(item.name for item in program.inputs), *(name for name, _ in program.numbers)}
    if wanted != given:
        missing, other = sorted(wanted - given), sorted(given - wanted)
        raise UsageError(f"the program's inputs are {', '.join(sorted(wanted))}; missing {missing}, not known {other}")
    slots: list[Slot] = []
    for item in program.inputs:
        pointer = inputs[item.name]
        if not isinstance(pointer, PointerTensor):
            raise UsageError(f"input '{item.name}' is here: .send() it to a worker first")
        found = pointer._slot.spec.type
        if (found.dtype, found.shape) != (item.type.dtype, item.type.shape):
            raise UsageError(f"input '{item.name}' is {item.type}, and was given {found}")
        if slots and pointer._slot.session is not slots[0].session:
            here, there = pointer.location.id, slots[0].session.location.id
            raise PlaceError(f"input '{item.name}' is at '{here}', and others are at '{there}': .move() it there")
        slots.append(pointer._slot)
    if not slots:
        raise UsageError("a program without inputs has no worker to run at")
    return slots


def _records(value: Any) -> Any:
    """A data set as a function takes it: all its records as one batch. Anything else as it is."""
    if isinstance(value, FederatedDataset):
        if len(value.parts) != 1:
            raise UsageError(f"a program runs at one worker, and this data set has parts at {len(value.parts)}")
        return tree_unflatten(value.parts[0].columns, value.parts[0].structure)
    if isinstance(value, MockDataset):
        return value.tensors if len(value.tensors) > 1 else value.tensors[0]
    return value


# -- the function -----------------------------------------------------------------------------------------


def _parameter_names(fn: Callable[..., Any]) -> Callable[[int], str]:
    """What a function's positional arguments are called."""
    try:
        parameters = list(inspect.signature(fn.forward if isinstance(fn, nn.Module) else fn).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")
    return lambda at: names[at] if at < len(names) else f"{rest}[{at - len(names)}]"


def _captured_modules(fn: Callable[..., Any]) -> list[tuple[str, nn.Module]]:
    """Modules that a function names without being given them: a closure's, globals, its object's own."""
    if isinstance(fn, nn.Module):
        return [("module", fn)]
    function = inspect.unwrap(fn.func if isinstance(fn, functools.partial) else fn)
    try:
        known = inspect.getclosurevars(function)
    except (TypeError, ValueError):
        return []
    own = getattr(getattr(function, "__self__", None), "__dict__", {})
    found = {**known.globals, **known.nonlocals, **own}
    return [(name, value) for name, value in found.items() if isinstance(value, nn.Module)]
