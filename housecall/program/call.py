"""Call and Program: `outs = op(args)`, and straight-line lists of them. Frozen, printable data.

What must live here: the grammar and its printed form. What must not: any meaning (`ops` has the rules, `run`
the values).

    Arg     ::= None | bool | int | float | str | Ref | Complex | Symbol | Items
    Call    ::= outs = op(args, kwargs)
    Program ::= inputs, calls, outputs, numbers

Outputs are positional, with holes: `convolution_backward` may return `(None, weight, bias)`, and dropping
the hole would shift every later result by one, silently. A hole is the id 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Literal

import msgspec

from ..types import Ref, Struct, TensorType

__all__ = [
    "HOLE",
    "Arg",
    "Call",
    "Complex",
    "Input",
    "Items",
    "Program",
    "Symbol",
    "call_text",
    "printed_names",
    "refs",
    "replaced",
    "text",
    "with_numbers",
]

HOLE = 0


class Complex(Struct, frozen=True, tag="complex", tag_field="t"):
    """A complex scalar."""

    real: float
    imag: float


class Symbol(Struct, frozen=True, tag="symbol", tag_field="t"):
    """A member of one of torch's enumerations, by name. The kind keeps data from impersonating a type."""

    kind: Literal["dtype", "device", "layout", "memory_format"]
    name: str


class Items(Struct, frozen=True, tag="items", tag_field="t"):
    """A list argument: sizes, dimensions, tensors, optional tensors."""

    items: tuple[Arg, ...]


Arg = None | bool | int | float | str | Ref | Complex | Symbol | Items


class Call(Struct, frozen=True, tag="call", tag_field="t", gc=False):
    """`outs = op(*args, **kwargs)`; `op` is an ATen overload without its namespace ("add.Tensor")."""

    op: str
    args: tuple[Arg, ...]
    kwargs: dict[str, Arg]
    outs: tuple[int, ...]


class Input(Struct, frozen=True):
    """A named input of a program, the id it binds, and its type. `updates`: the program may change it in place, as a
    training step does with a parameter; whatever is not marked so can only be read."""

    name: str
    id: int
    type: TensorType
    updates: bool = False


class Program(Struct, frozen=True, tag="program", tag_field="t"):
    """A straight-line, single-assignment list of calls with named inputs and outputs.

    `outputs` maps a name to a bound id. `numbers` are inputs of another kind, floats that each run is given anew (a
    learning rate, Adam's bias correction): a `Ref` to one stands where an operator takes a number. No shape depends
    on them. `program.check.check` says whether it may run, `program.run.run` runs it, `str` prints it.
    """

    inputs: tuple[Input, ...]
    calls: tuple[Call, ...]
    outputs: tuple[tuple[str, int], ...]
    numbers: tuple[tuple[str, int], ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical encoding, in hexadecimal: what an owner approves."""
        return hashlib.sha256(self.encoded()).hexdigest()

    def encoded(self) -> bytes:
        """The canonical encoding, MessagePack: equal programs have equal bytes."""
        return msgspec.msgpack.encode(self, order="deterministic")

    def __str__(self) -> str:
        return text(self)


def refs(arg: Arg) -> list[int]:
    """The ids that an argument reads, in order."""
    if isinstance(arg, Ref):
        return [arg.id]
    if isinstance(arg, Items):
        return [found for item in arg.items for found in refs(item)]
    return []


def with_numbers(program: Program, numbers: Mapping[str, float]) -> Program:
    """The same program with its numbers in their places, and none to be given. Raises `KeyError` for one that is
    missing."""
    if not program.numbers:
        return program
    values = {ref: numbers[name] for name, ref in program.numbers}
    calls = [replaced(call, lambda ref: values.get(ref.id, ref), call.outs) for call in program.calls]
    return Program(program.inputs, tuple(calls), program.outputs)


def replaced(call: Call, change: Callable[[Ref], Arg], outs: tuple[int, ...]) -> Call:
    """The same call with something else in the place of each `Ref`, also within lists, and binding other ids."""

    def arg(given: Arg) -> Arg:
        if isinstance(given, Ref):
            return change(given)
        return Items(tuple([arg(item) for item in given.items])) if isinstance(given, Items) else given

    args = tuple([arg(value) for value in call.args])  # in the order in which they stand
    return Call(call.op, args, {name: arg(value) for name, value in call.kwargs.items()}, outs)


def text(program: Program) -> str:
    """`program(inputs) { calls; return outputs }`, names for inputs, `%n` for the rest in order of binding. An input
    that the program changes in place is `updated`."""
    names = printed_names(program)
    given = [f"{item.name}: {item.type}{' updated' if item.updates else ''}" for item in program.inputs]
    inputs = ", ".join([*given, *(f"{name}: number" for name, _ in program.numbers)])
    lines = [f"  {call_text(call, names)}" for call in program.calls]
    outputs = ", ".join(f"{name}={names.get(ref, f'%?{ref}')}" for name, ref in program.outputs)
    return "\n".join([f"program({inputs}) {{", *lines, f"  return {outputs}", "}"])


def printed_names(program: Program) -> dict[int, str]:
    """What each id is called where a program is printed."""
    names = {item.id: item.name for item in program.inputs} | {ref: name for name, ref in program.numbers}
    for call in program.calls:
        for out in call.outs:
            if out != HOLE:
                names.setdefault(out, f"%{len(names)}")
    return names


def call_text(call: Call, names: dict[int, str] | None = None) -> str:
    """`%3, _ = max.dim(x, 1, keepdim=True)`; ids print as `%id` where no name is given."""
    known = names or {}
    outs = ", ".join("_" if out == HOLE else known.get(out, f"%{out}") for out in call.outs)
    args = [_arg(arg, known) for arg in call.args]
    args += [f"{key}={_arg(arg, known)}" for key, arg in call.kwargs.items()]
    bind = f"{outs} = " if call.outs else ""
    return f"{bind}{call.op}({', '.join(args)})"


def _arg(arg: Arg, names: dict[int, str]) -> str:
    match arg:
        case Ref(id=ref):
            return names.get(ref, f"%{ref}")
        case Items(items=items):
            return f"[{', '.join(_arg(item, names) for item in items)}]"
        case Complex(real=real, imag=imag):
            return repr(complex(real, imag))
        case Symbol(name=name):
            return name
        case _:
            return repr(arg)
