"""Programs by hand: run a function once on pointers without values, keep what it did, and run that anywhere.

    step = hc.record(train, model, x, y)        # nothing is computed
    print(step)                                 # the program: what an owner reads
    loss = step(model, x, y)                    # one message, at whichever worker they are

NOTE [What is an input]
The tensors among the arguments, the parameters and buffers of modules among them or named by the function, gradients
that are there before, and the state of every optimizer that steps. While the function is recorded, each of these
objects holds a pointer of a tape (torch's `swap_tensors`), so whoever refers to it, an optimizer say, sees the pointer;
afterwards each holds again what it held. So do optimizers, but for what the function did to other objects of Python.

NOTE [What a run changes]
Writes in place are kept as such: the program says which of its inputs it updates. Gradients and state that the function
made are outputs, and are put where the function put them.

NOTE [What is read once]
Everything in Python: numbers, flags, the function's own code. A run looks whether the types of its inputs, the plain
arguments, `training` of the modules and the optimizers' settings are those of a recording; if not, it records anew.
Numbers that an optimizer makes of its settings or its own count of steps (a learning rate, Adam's bias correction)
become numbers of the program, given anew with each run, as soon as they are seen to change.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import msgspec
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..errors import PlaceError, ProgramError, UsageError
from ..program.call import HOLE, Arg, Call, Input, Items, Program
from ..program.check import check
from ..program.files import save_program
from ..program.flow import input_writes
from ..program.ops import operator
from ..program.outcome import Spec, spec
from ..program.run import type_program
from ..program.typing import meta, type_of
from ..types import Ref, TensorType
from ..wire.messages import Define, Run
from .dispatch import point
from .module import with_first_states
from .optimizer import follow
from .session import Session, Slot, inside
from .tape import Tape
from .tensor import PointerTensor

__all__ = ["Recorded", "record", "run_program"]

_Settings = tuple[Any, ...]
_Place = tuple[int, int | str]  # a call's number, and which of its arguments


def record(fn: Callable[..., Any], *examples: Any) -> Recorded:
    """Record the pointer operations of `fn`, run once on `examples`: pointers, mocks, local tensors, tensors on the
    device "meta", `TensorType`s, modules, and plain values. No value is looked at and none is changed.

    Raises `UsageError` where the function needs a value, with the line; and for a tensor that is no argument."""
    recorded = Recorded(fn)
    recorded.prepare(*examples)
    return recorded


class Recorded:
    """A function as programs: one for each combination of types that it was given. Call it with pointers to run.

    What it returns are values: pointers without a graph behind them."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self._names = _parameter_names(fn)
        self._modules = _captured_modules(fn)
        self._optimizers: list[torch.optim.Optimizer] = []
        self._variants: dict[tuple[Any, ...], _Variant] = {}
        self._latest: _Variant | None = None
        self._defined: weakref.WeakKeyDictionary[Session, set[str]] = weakref.WeakKeyDictionary()
        functools.update_wrapper(self, fn, updated=())

    @property
    def program(self) -> Program:
        """The program that was recorded or run last."""
        if self._latest is None:
            raise UsageError("nothing is recorded yet: call .prepare() with examples")
        return self._latest.program

    @property
    def programs(self) -> tuple[Program, ...]:
        """All of them: one for each combination of types."""
        return tuple(dict.fromkeys(variant.program for variant in self._variants.values()))

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
        name = getattr(self.fn, "__qualname__", repr(self.fn))
        return f"<recorded {name}: {len(self._variants)} programs>"

    def prepare(self, *args: Any, **kwargs: Any) -> Program:
        """The program for arguments of these types, recorded now if it was not before. Nothing runs."""
        given = self._given(args, kwargs)
        variant = self._variants.get(self._key(given, None))
        if variant is None:
            variant = self._recorded(given)
        self._latest = variant
        return variant.program

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on pointers: one message. Parameters, buffers, gradients and optimizer state are what they would be had
        the function been called. Raises `UsageError` for tensors that are not at one worker."""
        given = self._given(args, kwargs)
        settings = _settings(self._optimizers)
        variant = self._variants.get(self._key(given, _place_of(given.leaves)))
        if variant is None:
            variant = self._recorded(given)
        elif variant.counts or variant.settings != settings:
            fresh = self._recording(given)
            if not variant.renew(fresh):
                variant = self._recorded(given)
        self._latest = variant
        return self._run(variant, given)

    # -- arguments ----------------------------------------------------------------------------------------

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Given:
        given = _Given()
        names = self._names
        values = [given.add(names(at), arg) for at, arg in enumerate(args)]
        named = {name: given.add(name, arg) for name, arg in kwargs.items()}
        for name, module in self._modules:
            given.add(name, module)
        given.args, given.kwargs = values, named
        return given

    def _key(self, given: _Given, session: Session | None) -> tuple[Any, ...]:
        """What decides which program it is."""
        key = given.key
        key.append(torch.is_grad_enabled())
        for leaf in given.leaves:
            key.append(_spec_of(leaf))
            if leaf.requires_grad:
                grad = leaf.grad if leaf.is_leaf else None
                key.append(grad if grad is None else _spec_of(grad))
        if len(given.seen) < len(given.order):
            key.append(tuple(given.order))
        for optimizer in self._optimizers:
            if optimizer.state:
                key.append(_state_key(optimizer, session))
        return tuple(key)

    # -- recording ----------------------------------------------------------------------------------------

    def _recorded(self, given: _Given) -> _Variant:
        """Record, and once more as of the next step if an optimizer counts its steps: what changes then is a number."""
        fresh = self._recording(given)
        variant = _Variant(fresh)
        if fresh.counts and not fresh.begins:
            with _advanced(fresh.counts):
                second = self._recording(given)
            if variant.renew(second):
                variant.renew(fresh)
        self._variants[self._key(self._again(given), None)] = variant
        return variant

    def _again(self, given: _Given) -> _Given:
        again = _Given()
        again.key = [part for part in given.key_of_arguments]
        again.leaves, again.seen, again.order = given.leaves, given.seen, given.order
        return again

    def _recording(self, given: _Given) -> _Recording:
        tape = Tape()
        taken = _Taken(tape, given)
        with taken.swapped(), taken.following_optimizers():
            try:
                result = self.fn(*given.args, **given.kwargs)
            except PlaceError as error:
                raise _explained(error, tape) from None
            recording = _Harvest(taken, result).recording()
        for optimizer in taken.optimizers:
            if not any(optimizer is known for known in self._optimizers):
                self._optimizers.append(optimizer)
        return recording

    # -- running ------------------------------------------------------------------------------------------

    def _run(self, variant: _Variant, given: _Given) -> Any:
        slots, session = _slots(variant.recording, given, self._optimizers)
        outs = [Slot(session) for _ in variant.program.outputs]
        _send(variant.program, variant.digest, variant.numbers, variant.draws, slots, outs, session, self._defined)
        if session.synchronous:
            session.describe(outs)
        return _bind(variant.recording, given, outs)
