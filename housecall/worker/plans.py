"""The programs of one session: defined once by digest, checked, and compiled to steps that run fast.

What must live here: how a program that came becomes something that runs, and how one run of it reads and binds slots.
What must not: any text of a peer's that becomes code. A plan is data for one loop: functions from the closed table,
registers by number, constants as values; names are not kept in it.

NOTE [Two ways to run]
A session without an account (`store`, no limits, nothing private) runs a plan's steps: registers in place of slots,
no look at types but those of the inputs. Any other runs the program's calls one by one through its meter, as if they
had been issued so: each is sized, labelled and kept in the history. `program.run.run` is the plain twin of both.

NOTE [Ids within a run]
There, what a program makes on its way stands in the session's store, under ids from 2**64 on: a peer cannot say these,
since no integer beyond 64 bits travels. They are gone when the run has ended, however it ended.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

import torch

from ..errors import LimitError, ProgramError
from ..program.call import HOLE, Arg, Call, Items, Program, call_text, refs
from ..program.check import check
from ..program.flow import input_writes
from ..program.ops import Operator, operator
from ..program.run import Randomness, last_uses, overload, value_of
from ..program.typing import DTYPES, type_of
from ..types import Ref
from ..wire.messages import Frame, Run
from .device import at_home
from .limits import Meter
from .store import Store

__all__ = ["MOST_BYTES", "MOST_CALLS", "MOST_PROGRAMS", "Plans"]

MOST_CALLS = 20_000  # of one program: a run is one turn, and others wait for it
MOST_PROGRAMS = 256  # of one session
MOST_BYTES = 16 << 20  # of all programs of one session, as encoded
_TEXT = 300  # characters of a call in an error

# A call's number, its function, what gives its arguments from the registers, the register of its result or pairs
# (which of its results, register), and the registers that nothing reads after it.
_Out = int | tuple[tuple[int, int], ...]
_Step = tuple[int, Callable[..., Any], Callable[[list[Any]], Any], _Out, tuple[int, ...]]


class Plans:
    """One session's programs. `device` is the worker's home, `randomness` the session's."""

    def __init__(self, device: torch.device, randomness: Randomness) -> None:
        self._device, self._randomness = device, randomness
        self._plans: dict[str, Plan] = {}
        self._refused: dict[str, str] = {}
        self._nbytes = 0
        self._ids = itertools.count(1 << 64)  # see NOTE [Ids within a run]

    def define(self, program: Program) -> None:
        """Keep a program under its digest. Raises `ProgramError` for one that breaks a rule, `LimitError` for more than
        a session may keep; whoever runs it nevertheless is told the same. What is kept already costs nothing."""
        encoded = program.encoded()
        digest = program.digest
        if digest in self._plans:
            return
        try:
            self._check_room(program, len(encoded))
            check(program)
            calls = program.calls
            if self._device.type != "cpu":
                calls = at_home(Frame(0, calls), self._device).messages  # type: ignore[assignment]  # calls stay calls
            self._plans[digest] = Plan(program, calls, self._randomness)
        except Exception as error:
            if len(self._refused) < MOST_PROGRAMS:
                self._refused[digest] = f"{type(error).__name__}: {error}"[: 2 * _TEXT]
            raise
        self._nbytes += len(encoded)

    def _check_room(self, program: Program, nbytes: int) -> None:
        if len(program.calls) > MOST_CALLS:
            raise LimitError(f"a program may have {MOST_CALLS:,} calls, this one has {len(program.calls):,}: divide it")
        if len(self._plans) >= MOST_PROGRAMS or self._nbytes + nbytes > MOST_BYTES:
            raise LimitError(
                f"this session keeps {len(self._plans)} programs of {self._nbytes:,} bytes, and may keep "
                f"{MOST_PROGRAMS} of {MOST_BYTES:,}: begin a new session"
            )

    def run(self, message: Run, store: Store, meter: Meter | None) -> None:
        """Run a program on slots of a store. Raises, with nothing changed and nothing bound, if it or its inputs are
        not what was defined; and, with nothing bound, if one of its calls fails: the error says what was changed."""
        plan = self._plans.get(message.digest)
        if plan is None:
            reason = self._refused.get(message.digest)
            why = f"it was refused: {reason}" if reason else "define it first"
            raise ProgramError(f"this session has no program {message.digest[:64]}; {why}")
        values = plan.values(message, store)
        _check_new(message.outs, store)
        if meter is None:
            found = plan.run(values, message.numbers)
            for out, value in zip(message.outs, found, strict=True):
                store[out] = value
        else:
            _Metered(plan, message, store, meter, self._ids).run()

    def updates(self, digest: str) -> bool:
        """Whether a run of this program was to change inputs, as far as is known."""
        plan = self._plans.get(digest)
        return plan is None or any(item.updates for item in plan.program.inputs)


def _check_new(outs: tuple[int, ...], store: Store) -> None:
    for out in outs:
        if out <= HOLE or out in store:
            raise ProgramError(f"%{out} is bound already, or no id; bind each id once")
    if len(set(outs)) < len(outs):
        raise ProgramError("an id is to be bound twice; bind each id once")


class Plan:
    """One program, checked, as steps over registers. `calls` are its calls with the worker's own device."""

    def __init__(self, program: Program, calls: tuple[Call, ...], randomness: Randomness) -> None:
        self.program, self.calls = program, calls
        self.last = last_uses(program)
        for item in program.inputs:
            if item.type.dtype not in DTYPES:
                raise ProgramError(f"input '{item.name}': unknown dtype '{item.type.dtype[:_TEXT]}'")
        self.types = [(item.name, DTYPES[item.type.dtype], torch.Size(item.type.shape)) for item in program.inputs]
        self.writes = tuple(input_writes(program))
        compiler = _Compiler(self, randomness)
        self._blank, self._steps, self._outs = compiler.blank, compiler.steps, compiler.outs
        self._first_number = 1 + len(program.inputs)

    def values(self, message: Run, store: Store) -> list[torch.Tensor]:
        """The values of a run's inputs, if they are what the program takes."""
        program = self.program
        for what, given, expected in (
            ("inputs", message.inputs, program.inputs),
            ("outputs", message.outs, program.outputs),
            ("numbers", message.numbers, program.numbers),
        ):
            if len(given) != len(expected):
                raise ProgramError(f"this program has {len(expected)} {what}, and {len(given)} were given")
        values = [store[ref] for ref in message.inputs]
        for (name, dtype, size), value in zip(self.types, values, strict=True):
            if isinstance(value, Exception):
                raise value
            if value.dtype is not dtype or value.shape != size:
                raise ProgramError(
                    f"input '{name}' is {str(dtype).removeprefix('torch.')}{list(size)}, and was given "
                    f"{type_of(value)}; nothing was changed"
                )
        return values

    def run(self, values: list[torch.Tensor], numbers: tuple[float, ...]) -> list[torch.Tensor]:
        """The outputs, in order."""
        registers = self._blank.copy()
        registers[1 : 1 + len(values)] = values
        if numbers:
            registers[self._first_number : self._first_number + len(numbers)] = numbers
        number = 0
        try:
            for number, function, arguments_of, out, dead in self._steps:  # noqa: B007  # read when one fails
                result = function(*arguments_of(registers))
                if out.__class__ is int:
                    registers[out] = result
                else:
                    for at, register in out:  # type: ignore[union-attr]  # not an int
                        if result[at] is None:
                            raise ProgramError("a result that is read later is none")
                        registers[register] = result[at]
                for register in dead:
                    registers[register] = None
        except Exception as error:
            raise self.failed(number, error) from None
        return [registers[out] for out in self._outs]

    def failed(self, number: int, error: Exception) -> ProgramError:
        """The error for a run whose call `number` failed: which, why, and what that leaves behind."""
        names = {item.id: item.name for item in self.program.inputs} | {ref: name for name, ref in self.program.numbers}
        call = "".join([call_text(call, names)[:_TEXT] for call in self.program.calls[number : number + 1]])
        changed = sorted({item.name for at, item in self.writes if at <= number})
        left = f"these inputs may have been changed: {', '.join(changed)}" if changed else "nothing was changed"
        return ProgramError(f"call {number}, `{call}`: {type(error).__name__}: {error}; {left}")


def _may_reshape(call: Call) -> bool:
    """Whether a call may give a value another shape under those that refer to it."""
    rules = operator(call.op)
    return rules.reshapes or any(param.writes and param.keyword for param in rules.params)


class _Compiler:
    """Program -> steps. Register 0 takes what nobody reads; then come inputs, numbers, and the rest as they are met.

    Constants are registers too, filled before the first step. A list argument that holds tensors is a step of its own,
    which makes the list."""

    def __init__(self, plan: Plan, randomness: Randomness) -> None:
        program = plan.program
        self.blank: list[Any] = [None]
        self._rows: list[tuple[int, Callable[..., Any], list[int], _Out]] = []  # as steps, with registers for a getter
        self._registers: dict[int, int] = {}
        self._made: set[int] = set()  # registers that a step fills
        self._turned: dict[int, int] = {}  # what `t` made -> of what
        self._randomness = randomness
        self._read = {ref for _, ref in program.outputs}
        for call in plan.calls:
            self._read.update(ref for arg in (*call.args, *call.kwargs.values()) for ref in refs(arg))
        for ref in (*(item.id for item in program.inputs), *(ref for _, ref in program.numbers)):
            self._registers[ref] = self._new(None)
        views_last = not any(_may_reshape(call) for call in plan.calls)
        for number, call in enumerate(plan.calls):
            if not (views_last and self._turned_back(call)):
                self._compiled(number, call)
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
            yield number, function, _getter(row), out, tuple(dead.get(at, ()))

    def _turned_back(self, call: Call) -> bool:
        """Whether this turns back a matrix that was turned (autograd does so for every linear layer): no step then."""
        if call.op != "t.default" or len(call.args) != 1 or not isinstance(call.args[0], Ref):
            return False
        source = call.args[0].id
        if source in self._turned:
            self._registers[call.outs[0]] = self._registers[self._turned[source]]
            return True
        self._turned[call.outs[0]] = source
        return False

    def _compiled(self, number: int, call: Call) -> None:
        """Append the rows of one call."""
        rules = operator(call.op)
        by_name = dict(call.kwargs)
        given = list(call.args)
        for param in [param for param in rules.params if not param.keyword][len(given) :]:
            if param.name not in by_name:
                break
            given.append(by_name.pop(param.name))
        row = [self._register(number, arg) for arg in given]
        named = {name: arg for name, arg in by_name.items() if refs(arg)}
        fixed = {name: value_of(arg, {}) for name, arg in by_name.items() if name not in named}
        function = self._function(rules, fixed, len(row), tuple(named))
        row += [self._register(number, arg) for arg in named.values()]
        function, out = self._results(rules, call, function)
        self._rows.append((number, function, row, out))

    def _register(self, number: int, arg: Arg) -> int:
        """The register of an argument."""
        if isinstance(arg, Ref):
            return self._registers[arg.id]
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


def _getter(row: list[int]) -> Callable[[list[Any]], Any]:
    """What gives a step's arguments, as a sequence."""
    if len(row) > 1:
        return itemgetter(*row)
    return itemgetter(slice(row[0], row[0] + 1)) if row else lambda registers: ()


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


class _Metered:
    """One run through a meter, call by call. See NOTE [Two ways to run]."""

    def __init__(self, plan: Plan, message: Run, store: Store, meter: Meter, ids: Iterator[int]) -> None:
        self._plan, self._message, self._store, self._meter, self._ids = plan, message, store, meter, ids
        program = plan.program
        self._slots = {item.id: ref for item, ref in zip(program.inputs, message.inputs, strict=True)}
        self._numbers = {ref: number for (_, ref), number in zip(program.numbers, message.numbers, strict=True)}
        self._given = frozenset(self._slots)
        self._outs: dict[int, int] = {}  # id in the program -> slot, of what a call makes
        for (_, ref), out in zip(program.outputs, message.outs, strict=True):
            if ref not in self._given:
                self._outs.setdefault(ref, out)
        self._bound: set[int] = set()  # slots that this run has bound

    def run(self) -> None:
        """Run every call, then bind the outputs; or unbind all and raise."""
        plan, store, meter = self._plan, self._store, self._meter
        meter.check_room("run", len(self._message.outs), 0)
        number = 0
        began = meter.clock()
        try:
            for number, call in enumerate(plan.calls):
                limit = meter.limits.compute_s
                if limit is not None and meter.spent + meter.clock() - began >= limit:
                    raise LimitError(f"this session has used up its {limit:,g} s of computing time")
                meter.call(self._placed(call))
                for ref in plan.last.get(number, ()):
                    if ref in self._slots and ref not in self._given:  # else a number, or an input
                        self._drop(self._slots[ref])
            self._bind_outputs()
        except Exception as error:
            for slot in tuple(self._bound):
                self._drop(slot)
            raise plan.failed(number, error) from None
        self._bound.difference_update(self._message.outs)
        for slot in tuple(self._bound):
            store.drop(slot)

    def _placed(self, call: Call) -> Call:
        """The call with slots for ids, fresh ones for what it makes."""
        args = tuple([self._arg(arg) for arg in call.args])
        named = {name: self._arg(arg) for name, arg in call.kwargs.items()}
        outs = []
        for out in call.outs:
            if out != HOLE:
                slot = self._slots[out] = self._outs[out] if out in self._outs else next(self._ids)
                self._bound.add(slot)
                outs.append(slot)
            else:
                outs.append(HOLE)
        return Call(call.op, args, named, tuple(outs))

    def _arg(self, arg: Arg) -> Arg:
        if isinstance(arg, Ref):
            return self._numbers[arg.id] if arg.id in self._numbers else Ref(self._slots[arg.id])
        if isinstance(arg, Items):
            return Items(tuple([self._arg(item) for item in arg.items]))
        return arg

    def _drop(self, slot: int) -> None:
        self._bound.discard(slot)
        self._store.drop(slot)

    def _bind_outputs(self) -> None:
        """Outputs that are inputs, or twice the same: another slot for the same value."""
        for (name, ref), out in zip(self._plan.program.outputs, self._message.outs, strict=True):
            slot = self._slots[ref]
            if slot not in self._store:
                raise ProgramError(f"output '{name}': a result that is read later is none")
            if slot != out:
                self._store[out] = self._store[slot]
                self._bound.add(out)
                self._store.count(out, self._store[out])
