"""A program, compiled to steps that run fast: functions of the closed table over registers, in one loop.

What must live here: how a program's calls become steps, and the loop. What must not: sessions, slots, limits. A plan is
data for that loop: functions, registers by number, constants as values. Nothing of a peer's text is code, and names are
not kept in it.

NOTE [What fails]
A plan does what its calls would do one by one. A call that fails leaves the failure in the registers of its results;
whatever reads one fails for the same reason, since no operator takes an exception for a tensor. The rest is done.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

import torch

from ..errors import ProgramError
from ..program.call import HOLE, Arg, Call, Items, Program, refs
from ..program.flow import written
from ..program.ops import Operator, operator
from ..program.run import Randomness, last_uses, overload, value_of
from ..program.trust import check_values, from_forward, trusts_values
from ..program.typing import DTYPES
from ..types import Ref
from .reuse import in_place, taken_over, writes_are_its_own
from .store import Failed, Halt

__all__ = ["NONE", "Plan", "Precedents", "Report"]

NONE = "a result that is read later is none"

# What becomes of a call that failed: its number, the call, the error -> what stands in the place of its results: one
# thing for all, or a list with one for each of its ids.
Report = Callable[[int, Call, Exception], Any]

_MOST = 64  # precedents of one plan
_TEXT = 300  # characters of a name in an error

# A call's number, its function, what gives its arguments from the registers, the register of its result, or else pairs
# (which of its results, register), and the registers that nothing reads after it.
_Out = int | tuple[tuple[int, int], ...]
_Pairs = tuple[tuple[int, int], ...] | None
_Step = tuple[int, Callable[..., Any], Callable[[list[Any]], Any], int, _Pairs, tuple[int, ...]]


class Precedents(dict[Any, Any]):
    """What `metered` keeps of the runs of one program, by what decides how a run is judged. `closed`: what is there
    holds for every run alike and nothing is added, so that what one run does decides nothing of how the next goes."""

    closed = False

    def learn(self, key: Any, precedent: Any) -> None:
        """Keep what a run took, as long as there is room."""
        if not self.closed and len(self) < _MOST:
            self[key] = precedent


class Plan:
    """One program, checked, as steps over registers. `calls` are its calls with the worker's own device."""

    def __init__(self, program: Program, calls: tuple[Call, ...], randomness: Randomness, halt: Halt) -> None:
        self.program, self.calls = program, calls
        self.last = last_uses(program)
        for item in program.inputs:
            if item.type.dtype not in DTYPES:
                raise ProgramError(f"input '{item.name}': unknown dtype '{item.type.dtype[:_TEXT]}'")
        self.updates = tuple([item for item in program.inputs if item.updates])
        self.alike = writes_are_its_own(program)  # else a run on other slots may write where this one did not
        self.precedents = Precedents()
        compiler = _Compiler(self, randomness, halt)
        self._blank, self._steps, self._outs, self._names = (
            compiler.blank, compiler.steps, compiler.outs, compiler.names,
        )  # fmt: skip
        self._first_number = 1 + len(program.inputs)

    def registers(self, values: list[Any], numbers: tuple[float, ...]) -> list[Any]:
        """The registers of one run: its inputs, its numbers, the constants."""
        registers = self._blank.copy()
        registers[1 : 1 + len(values)] = values
        if numbers:
            registers[self._first_number : self._first_number + len(numbers)] = numbers
        return registers

    def run(self, registers: list[Any], report: Report, every: int = 1, *, looks: bool = False) -> Iterator[None]:
        """Take the steps, `every` so many at a time; see NOTE [What fails]. `looks`: at elements that a kernel would
        trust."""
        pauses = every <= len(self.calls)
        for number, function, arguments_of, out, pairs, dead in self._looking if looks else self._steps:
            try:
                if pairs is None:
                    registers[out] = function(*arguments_of(registers))
                else:
                    result = function(*arguments_of(registers))
                    for at, register in pairs:
                        registers[register] = result[at]
                        if result[at] is None:
                            failed = report(number, self.calls[number], ProgramError(NONE))
                            registers[register] = failed[at] if isinstance(failed, list) else failed
            except Exception as error:  # whatever it is, it is an answer
                if not isinstance(error, Failed):  # else nothing is written, and `error` is the cause of that
                    error = _failed(arguments_of(registers)) or error
                failed = report(number, self.calls[number], error)
                for at, register in ((0, out),) if pairs is None else pairs:
                    registers[register] = failed[at] if isinstance(failed, list) else failed
            for register in dead:
                registers[register] = None
            if pauses and number % every == every - 1:
                yield

    @functools.cached_property
    def _looking(self) -> tuple[_Step, ...]:
        """The steps, but those that trust elements look at them first."""
        known = from_forward(self.calls)
        found = []
        for number, function, arguments_of, out, pairs, dead in self._steps:
            op = self.calls[number].op
            looks = function is not _listed and trusts_values(op) and number not in known
            first = _looking(function, op, *self._names[number]) if looks else function
            found.append((number, first, arguments_of, out, pairs, dead))
        return tuple(found)

    def outputs(self, registers: list[Any]) -> list[Any]:
        """What a run has made, in the order of the program's outputs: tensors, and what stands for failures."""
        return [registers[out] for out in self._outs]


def _looking(function: Callable[..., Any], op: str, names: list[str], fixed: dict[str, Any]) -> Callable[..., Any]:
    """A step's function that looks at elements first; `names` are those of its arguments."""

    def looks(*args: Any) -> Any:
        check_values(op, {**fixed, **dict(zip(names, args, strict=True))})
        return function(*args)

    return looks


def _failed(arguments: Any) -> Exception | None:
    """The first failure among the arguments of a step."""
    for arg in arguments:
        found = _failed(arg) if isinstance(arg, list | tuple) else arg
        if isinstance(found, Exception):
            return found
    return None


def _may_reshape(call: Call) -> bool:
    """Whether a call may give a value another shape under those that refer to it."""
    rules = operator(call.op)
    return rules.reshapes or any(param.writes and param.keyword for param in rules.params)


class _Compiler:
    """Program -> steps. Register 0 takes what nobody reads; then come inputs, numbers, and the rest as they are met.

    Constants are registers too, filled before the first step. A list argument that holds tensors is a step of its own,
    which makes the list."""

    def __init__(self, plan: Plan, randomness: Randomness, halt: Halt) -> None:
        program = plan.program
        self._halt = halt
        self.blank: list[Any] = [None]
        self._rows: list[tuple[int, Callable[..., Any], list[int], _Out]] = []  # as steps, with registers for a getter
        self._registers: dict[int, int] = {}
        self._made: set[int] = set()  # registers that a step fills
        self.names: dict[int, tuple[list[str], dict[str, Any]]] = {}  # of a step's arguments, and those that are fixed
        self._turned: dict[int, int] = {}  # what `t` made -> of what
        self._waiting: dict[int, tuple[int, Call]] = {}  # what `t` is to make if anything but a product reads it
        self._randomness = randomness
        self._read = {ref for _, ref in program.outputs}
        for call in plan.calls:
            self._read.update(ref for arg in (*call.args, *call.kwargs.values()) for ref in refs(arg))
        for ref in (*(item.id for item in program.inputs), *(ref for _, ref in program.numbers)):
            self._registers[ref] = self._new(None)
        self._matrices = {item.id for item in program.inputs if len(item.type.shape) == 2}  # and what is made of them
        self._views_last = not any(_may_reshape(call) for call in plan.calls)
        self._over = taken_over(program)
        for number, call in enumerate(plan.calls):
            if not self._may_wait(number, call):
                self._compiled(number, call)
        for ref in [ref for _, ref in program.outputs]:
            self._found(ref)
        self.outs = [self._registers[ref] for _, ref in program.outputs]
        self.steps = tuple(self._steps())

    def _new(self, value: Any) -> int:
        self.blank.append(value)
        return len(self.blank) - 1

    def _new_made(self) -> int:
        register = self._new(None)
        self._made.add(register)
        return register

    def _steps(self) -> Iterator[_Step]:
        """The rows as steps: each frees the registers that no later one reads."""
        last: dict[int, int] = {}
        for at, (_, _, row, out) in enumerate(self._rows):
            filled = [out] if isinstance(out, int) else [register for _, register in out]
            last.update(dict.fromkeys((*row, *filled), at))
        dead: dict[int, list[int]] = {}
        for register in self._made.difference(self.outs):
            dead.setdefault(last[register], []).append(register)
        for at, (number, function, row, out) in enumerate(self._rows):
            one, pairs = (out, None) if isinstance(out, int) else (0, out)
            yield number, function, _getter(row), one, pairs, tuple(dead.get(at, ()))

    def _may_wait(self, number: int, call: Call) -> bool:
        """Whether this turns a matrix (autograd does so all the time): if it turns back what was turned there is no
        step, and products turn for themselves what they read."""
        if not self._views_last or call.op != "t.default" or len(call.args) != 1 or not isinstance(call.args[0], Ref):
            return False
        out, source = call.outs[0], call.args[0].id
        if source not in self._matrices:  # perhaps it fails
            return False
        self._matrices.add(out)
        if source in self._turned:
            self._registers[out] = self._registers[self._turned[source]]
        else:
            self._found(source)
            self._turned[out] = source
            self._waiting[out] = number, call
        return True

    def _found(self, ref: int) -> int:
        """The register of a value; if it was to be turned once somebody reads it, that is a step now."""
        if ref not in self._registers:
            self._compiled(*self._waiting.pop(ref))
        return self._registers[ref]

    def _compiled(self, number: int, call: Call) -> None:
        """Append the rows of one call."""
        rules = operator(call.op)
        by_name = dict(call.kwargs)
        given = list(call.args)
        for param in [param for param in rules.params if not param.keyword][len(given) :]:
            if param.name not in by_name:
                break
            given.append(by_name.pop(param.name))
        turned = tuple([at for at, arg in enumerate(given) if isinstance(arg, Ref) and arg.id in self._waiting])
        turning = _TURNING.get((call.op, turned)) if turned and not by_name else None
        if turning is not None:
            given = [Ref(self._turned[arg.id]) if at in turned else arg for at, arg in enumerate(given)]  # type: ignore[union-attr]  # those that are turned are references
        row = [self._register(number, arg) for arg in given]
        named = {name: arg for name, arg in by_name.items() if refs(arg)}
        names = [param.name for param in rules.params][: len(given)]
        fixed = {name: value_of(arg, {}) for name, arg in by_name.items() if name not in named}
        self.names[number] = [*names, *named], fixed
        writes = bool(written(call, rules))
        function = in_place(call.op) if number in self._over else turning
        if writes and len(row) == 2 and tuple(named) == ("alpha",):
            function = _scaled_unless_halted(self._function(rules, fixed, 2, ()), self._halt)
        elif function is None:
            function = self._function(rules, fixed, len(row), tuple(named))
            function = _unless_halted(function, self._halt) if writes else function
        row += [self._register(number, arg) for arg in named.values()]
        if call.op in ("mm.default", "addmm.default"):
            self._matrices.update(call.outs)
        function, out = self._results(rules, call, function)
        self._rows.append((number, function, row, out))

    def _register(self, number: int, arg: Arg) -> int:
        """The register of an argument."""
        if isinstance(arg, Ref):
            return self._found(arg.id)
        if isinstance(arg, Items) and refs(arg):
            row = [self._register(number, item) for item in arg.items]
            made = self._new_made()
            self._rows.append((number, _listed, row, made))
            return made
        return self._new(value_of(arg, {}))

    def _function(
        self, rules: Operator, fixed: dict[str, Any], count: int, names: tuple[str, ...]
    ) -> Callable[..., Any]:
        function: Callable[..., Any] = overload(rules.name)._op  # type: ignore[attr-defined]  # what the overload calls
        function = _DIRECT.get(rules.name, function)
        if fixed:
            function = functools.partial(function, **fixed)
        if names:
            function = _with_names(function, count, names)
        return _drawing(function, self._randomness) if rules.random else function

    def _results(self, rules: Operator, call: Call, function: Callable[..., Any]) -> tuple[Callable[..., Any], _Out]:
        fresh = [(at, item) for at, item in enumerate(rules.returns) if not item.same_as]
        if not fresh:
            return function, 0
        read = [(at, out) for at, out in enumerate(call.outs) if out != HOLE and out in self._read]
        for _, out in read:
            self._registers[out] = self._new_made()
        if any(item.many or item.kind != "Tensor" for _, item in fresh):
            function = _flat(function, rules, len(call.outs))
            return function, tuple((at, self._registers[out]) for at, out in read)
        if len(rules.returns) == 1:
            return function, self._registers[read[0][1]] if read else 0
        return function, tuple((fresh[at][0], self._registers[out]) for at, out in read)


# torch's own Python functions for operators that small steps are full of. They find the same operator for the same
# arguments without looking at its schema again; a test holds each against its overload.
_functions: Any = torch._C._VariableFunctions
_DIRECT: dict[str, Callable[..., Any]] = {
    "_log_softmax.default": _functions._log_softmax,
    "_log_softmax_backward_data.default": _functions._log_softmax_backward_data,
    "add_.Tensor": torch.Tensor.add_,
    "addmm.default": _functions.addmm,
    "index_select.default": _functions.index_select,
    "mm.default": _functions.mm,
    "mul_.Tensor": torch.Tensor.mul_,
    "ones_like.default": _functions.ones_like,
    "relu.default": _functions.relu,
    "sum.dim_IntList": _functions.sum,
    "t.default": _functions.t,
    "view.default": torch.Tensor.view,
    "zeros_like.default": _functions.zeros_like,
}


_linear: Any = torch._C._nn.linear


def _turning_mm(x: Any, y: Any) -> Any:
    return _functions.mm(x.t(), y)


def _mm_turning(x: Any, y: Any) -> Any:
    return _functions.mm(x, y.t())


def _addmm_turning(bias: Any, x: Any, y: Any) -> Any:
    if bias.dim() == 1 and x.dim() == 2:
        return _linear(x, y, bias)  # which is that, in C++
    return _functions.addmm(bias, x, y.t())


# Products that turn for themselves the arguments at these places.
_TURNING: dict[tuple[str, tuple[int, ...]], Callable[..., Any]] = {
    ("mm.default", (0,)): _turning_mm,
    ("mm.default", (1,)): _mm_turning,
    ("addmm.default", (2,)): _addmm_turning,
}


def _getter(row: list[int]) -> Callable[[list[Any]], Any]:
    """What gives a step's arguments, as a sequence."""
    if len(row) > 1:
        return itemgetter(*row)
    return itemgetter(slice(row[0], row[0] + 1)) if row else lambda registers: ()


def _unless_halted(function: Callable[..., Any], halt: Halt) -> Callable[..., Any]:
    """A function that changes something in place, and does not after a failure."""

    def checked(*args: Any) -> Any:
        if halt.cause is not None:
            raise halt.cause
        return function(*args)

    return checked


def _scaled_unless_halted(function: Callable[..., Any], halt: Halt) -> Callable[..., Any]:
    """The same, for an optimizer's `add_(grad, alpha=-rate)`."""

    def checked(x: Any, y: Any, alpha: Any) -> Any:
        if halt.cause is not None:
            raise halt.cause
        return function(x, y, alpha=alpha)

    return checked


def _listed(*items: Any) -> list[Any]:
    return list(items)


def _with_names(function: Callable[..., Any], count: int, names: tuple[str, ...]) -> Callable[..., Any]:
    """The function with its arguments from `count` on given by name."""

    def named(*args: Any) -> Any:
        return function(*args[:count], **dict(zip(names, args[count:], strict=True)))

    return named


def _drawing(function: Callable[..., Any], randomness: Randomness) -> Callable[..., Any]:
    """The function with the session's random numbers."""

    def drawn(*args: Any) -> Any:
        with randomness.drawing():
            return function(*args)

    return drawn


def _flat(function: Callable[..., Any], rules: Operator, count: int) -> Callable[..., Any]:
    """The function with what it makes in one row, as long as there are ids; truths and numbers as tensors."""
    returns = rules.returns

    def flat(*args: Any) -> list[Any]:
        result = function(*args)
        results = result if len(returns) > 1 else (result,)
        row: list[Any] = []
        for item, value in zip(returns, results, strict=True):
            if not item.same_as:
                row.extend(value if item.many else (value,))
        if len(row) > count or (len(row) < count and not returns[-1].many):
            raise ProgramError(f"{count} outputs bound, {len(row)} came")
        row = [value if value is None or isinstance(value, torch.Tensor) else torch.tensor(value) for value in row]
        return row + [None] * (count - len(row))

    return flat
