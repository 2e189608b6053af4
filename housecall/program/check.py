"""Which programs may run: bound once, bound before use, allowed, typed, writing only to what they say they update.

A walk over data: no torch, no values. Every error names the call by its number and prints it.
"""

from __future__ import annotations

import re

from ..errors import ProgramError
from ..types import Ref, TensorType
from .call import HOLE, Arg, Call, Complex, Items, Program, Symbol, call_text, refs
from .ops import Operator, Param, operator

__all__ = ["arguments", "check", "check_call", "complete_arguments", "written_by"]

# What each kind of parameter takes. bool before int: Python's True is an int, a dimension is not a truth. Beside a
# tensor, torch takes a number where one more may stand (`mul.Tensor(x, 0.9)`): it has no dimensions, and no dtype.
_TAKES: dict[str, tuple[type, ...]] = {
    "Tensor": (Ref, bool, int, float, Complex),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "Scalar": (bool, int, float, Complex),
    "complex": (bool, int, float, Complex),
    "str": (str,),
    "ScalarType": (Symbol,),
    "Device": (Symbol,),
    "Layout": (Symbol,),
    "MemoryFormat": (Symbol,),
    "Generator": (),
}
_DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?", re.ASCII)
_SHOWN = 500  # characters of a call in an error
_SYMBOLS = {"ScalarType": "dtype", "Device": "device", "Layout": "layout", "MemoryFormat": "memory_format"}


def check(program: Program) -> None:
    """Raise `ProgramError` (or its `UnknownOperator`) unless the program may run."""
    bound: set[int] = set()
    for item in program.inputs:
        if item.id in bound or item.id == HOLE:
            raise ProgramError(f"input '{item.name}' binds %{item.id}, which is bound already; bind each id once")
        _check_type(item.name, item.type)
        bound.add(item.id)
    numbers: set[int] = set()
    for name, ref in program.numbers:
        if ref in bound or ref in numbers or ref == HOLE:
            raise ProgramError(f"number '{name}' binds %{ref}, which is bound already; bind each id once")
        numbers.add(ref)
    shares = {item.id: {item.id} for item in program.inputs}  # whose storage a value may share
    updated = {item.id for item in program.inputs if item.updates}
    for number, call in enumerate(program.calls):
        try:
            plain = _without_numbers(call, numbers) if numbers else call
            check_call(plain)
            _check_binding(plain, bound, numbers, shares, updated)
        except ProgramError as error:
            shown = call_text(call)
            brief = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
            raise type(error)(f"call {number}, `{brief}`: {error}") from None
        bound.update(out for out in call.outs if out != HOLE)
    for name, ref in program.outputs:
        if ref not in bound:
            raise ProgramError(f"output '{name}' is %{ref}, which nothing binds")


def _check_type(name: str, type_: TensorType) -> None:
    if len(type_.shape) != len(type_.stride) or min((*type_.shape, *type_.stride, type_.offset), default=0) < 0:
        raise ProgramError(f"input '{name}': {type_} with stride {type_.stride} is no tensor's type")
    if not _DEVICE.fullmatch(type_.device):  # it is printed, to an owner who reads the program
        raise ProgramError(f"input '{name}': {type_.device[:40]!r} is no device; write 'cpu', 'cuda' or 'cuda:N'")


def _without_numbers(call: Call, numbers: set[int]) -> Call:
    """The call with some number where one of the program's stands. Raises `ProgramError` where none may."""
    rules = operator(call.op)
    if rules.name.startswith(("arange", "range")):  # as long as their numbers say
        numbers = set()

    def placed(arg: Arg) -> Arg:
        return 0.0 if isinstance(arg, Ref) and arg.id in numbers else arg

    args = tuple([placed(arg) for arg in call.args])
    return Call(call.op, args, {name: placed(arg) for name, arg in call.kwargs.items()}, call.outs)


def _check_binding(
    call: Call, bound: set[int], numbers: set[int], shares: dict[int, set[int]], updated: set[int]
) -> None:
    for arg in (*call.args, *call.kwargs.values()):
        for ref in refs(arg):
            if ref not in bound:
                raise ProgramError(f"%{ref} is used before it is bound")
    fresh: set[int] = set()
    for out in call.outs:
        if out != HOLE and (out in bound or out in numbers or out in fresh):
            raise ProgramError(f"%{out} is bound already; bind each id once")
        fresh.add(out)
    rules = operator(call.op)
    pairs = {param.name: (param, arg) for param, arg in arguments(rules, call)}
    for param, arg in written_by(rules, call):
        # A stored program that writes to its inputs would leak one run into the next, unless it says so.
        given = {root for ref in refs(arg) for root in shares.get(ref, ())}
        if given - updated:
            raise ProgramError(
                f"'{param.name}' is an input of the program, or a view of one, and would be written; clone it first"
            )
        if given and (rules.reshapes or param.keyword):
            raise ProgramError(
                f"'{param.name}' is an input of the program, or a view of one, and its size might be changed: write "
                "to one with operators that change elements only"
            )
    sources = [pairs[item.view_of][1] for item in rules.returns if item.view_of in pairs]
    roots: set[int] = set()
    for source in sources:
        roots.update(*(shares.get(ref, set()) for ref in refs(source)))
    shares.update(dict.fromkeys(call.outs, roots))


def check_call(call: Call) -> Operator:
    """Check one call against its operator's schema, and return the operator."""
    rules = operator(call.op)
    for param, arg in complete_arguments(rules, call):
        _check_argument(param, arg)
    return rules


def complete_arguments(rules: Operator, call: Call) -> list[tuple[Param, Arg]]:
    """`arguments`, when none is missing and as many ids are bound as there are results; kinds are not looked at.
    Raises `ProgramError`."""
    pairs = arguments(rules, call)
    given = {param.name for param, _ in pairs}
    for param in rules.params:
        if param.required and param.name not in given:
            raise ProgramError(f"'{param.name}' is missing; the schema is {rules.schema}")
    _check_outs(rules, call)
    return pairs


def arguments(rules: Operator, call: Call) -> list[tuple[Param, Arg]]:
    """Each argument beside the parameter that takes it. Raises `ProgramError` for one that none takes."""
    positional = [param for param in rules.params if not param.keyword]
    if len(call.args) > len(positional):
        raise ProgramError(f"{len(call.args)} positional arguments, at most {len(positional)} expected: {rules.schema}")
    pairs = list(zip(positional, call.args, strict=False))
    taken = {param.name for param, _ in pairs}
    by_name = {param.name: param for param in rules.params}
    for name, arg in call.kwargs.items():
        if name not in by_name or name in taken:
            raise ProgramError(f"unexpected argument '{name}'; the schema is {rules.schema}")
        pairs.append((by_name[name], arg))
    return pairs


def written_by(rules: Operator, call: Call) -> list[tuple[Param, Arg]]:
    """The arguments that a call writes to in place, each beside its parameter."""
    pairs = arguments(rules, call)
    flags = {param.name: arg for param, arg in pairs if arg is False}
    return [(param, arg) for param, arg in pairs if param.writes and param.if_ not in flags]


def _check_argument(param: Param, arg: Arg) -> None:
    if arg is None and param.optional:
        return
    if param.many and isinstance(arg, Items):
        for item in arg.items:
            if not (item is None and param.item_optional):
                _check_one(param, item)
        return
    if param.many and param.kind == "Tensor":
        raise ProgramError(f"'{param.name}' expects a list of tensors, found {type(arg).__name__} {arg!r}")
    _check_one(param, arg)  # `int[2] size=3` takes one int for all, as torch does


def _check_one(param: Param, arg: Arg) -> None:
    takes = _TAKES[param.kind]
    if param.kind == "Tensor" and (param.many or param.writes or param.name == "self"):
        takes = (Ref,)
    impostor = isinstance(arg, bool) and bool not in takes
    if impostor or not isinstance(arg, takes):
        raise ProgramError(f"'{param.name}' expects {param.kind}, found {type(arg).__name__} {arg!r}")
    if isinstance(arg, Symbol) and arg.kind != _SYMBOLS[param.kind]:
        raise ProgramError(f"'{param.name}' expects a {_SYMBOLS[param.kind]}, found the {arg.kind} {arg.name}")


def _check_outs(rules: Operator, call: Call) -> None:
    fresh = [item for item in rules.returns if not item.same_as]
    fits = len(call.outs) >= len(fresh) - 1 if any(item.many for item in fresh) else len(call.outs) == len(fresh)
    if not fits:
        raise ProgramError(f"{len(call.outs)} outputs bound, {len(fresh)} expected: {rules.schema}")
