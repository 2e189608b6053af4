"""The programs of one session: defined once by digest, checked, compiled, and run on its slots.

What must live here: which programs a session keeps, and how one run of one reads and binds slots. What must not: steps
(`plan`), and what a single call may take (`limits`).

NOTE [Two ways to run]
A session without an account (`store`, no limits, nothing private) runs a plan's steps: registers in place of slots,
no look at types but those of the inputs. Any other runs through its meter (`metered`). Issuing the calls one by one is
the plain twin of both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import LimitError, ProgramError
from ..program.call import HOLE, Program
from ..program.check import check
from ..program.run import Randomness
from ..wire.messages import Frame, Run
from .device import at_home
from .limits import Meter
from .metered import Metered
from .plan import Plan, Precedents, Report
from .private import draws_of
from .store import Draws, Failed, Halt, Missing, Store

__all__ = ["MOST_BYTES", "MOST_CALLS", "MOST_PROGRAMS", "Plans"]

MOST_CALLS = 20_000  # of one program
MOST_PROGRAMS = 256  # of one session
MOST_BYTES = 16 << 20  # of all programs of one session, as encoded
_TEXT = 600  # characters of a reason that is kept


class Plans:
    """One session's programs. `device` is the worker's home, `randomness` and `halt` the session's."""

    def __init__(self, device: torch.device, randomness: Randomness, halt: Halt | None = None) -> None:
        self._device, self._randomness = device, randomness
        self._halt = Halt() if halt is None else halt
        self._plans: dict[str, Plan] = {}
        self._draws: dict[str, Draws] = {}
        self._refused: dict[str, str] = {}
        self._nbytes = 0
        self._ids = itertools.count(1 << 64)  # see NOTE [Ids within a run] in `metered`

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
            self._plans[digest] = Plan(program, calls, self._randomness, self._halt)
        except Exception as error:
            if len(self._refused) < MOST_PROGRAMS:
                self._refused[digest] = f"{type(error).__name__}: {error}"[:_TEXT]
            raise
        self._draws[digest] = draws_of(program)
        self._nbytes += len(encoded)

    def _check_room(self, program: Program, nbytes: int) -> None:
        if len(program.calls) > MOST_CALLS:
            raise LimitError(f"a program may have {MOST_CALLS:,} calls, this one has {len(program.calls):,}: divide it")
        if len(self._plans) >= MOST_PROGRAMS or self._nbytes + nbytes > MOST_BYTES:
            raise LimitError(
                f"this session keeps {len(self._plans)} programs of {self._nbytes:,} bytes, and may keep "
                f"{MOST_PROGRAMS} of {MOST_BYTES:,}: begin a new session"
            )

    def program(self, digest: str) -> Program:
        """The program of this digest. Raises `ProgramError` if there is none."""
        return self._plan(digest).program

    def draws(self, digest: str) -> Draws:
        """What the program of this digest draws of random numbers. Raises `ProgramError` if there is none."""
        self._plan(digest)
        return self._draws[digest]

    def _plan(self, digest: str) -> Plan:
        plan = self._plans.get(digest)
        if plan is None:
            reason = self._refused.get(digest)
            why = f"it was refused: {reason}" if reason else "define it first"
            raise ProgramError(f"this session has no program {digest[:64]}; {why}")
        return plan

    def run(
        self,
        message: Run,
        store: Store,
        meter: Meter | None,
        report: Report,
        every: int = 1,
        precedents: Precedents | None = None,
    ) -> Iterator[None]:
        """Run a program on slots of a store, `every` so many calls at a time; `report` is told of each that fails, as
        one would whose arguments do not fit. Through a meter it goes by these `precedents`, or by the program's own.
        Raises, with nothing changed and nothing bound, what `check` does."""
        plan = self._plan(message.digest)
        self.check(message, store)
        try:
            values = [store[ref] for ref in message.inputs]
        except (Missing, Failed):
            values = [_value(ref, store) for ref in message.inputs]
        if meter is not None:
            return Metered(plan, message, values, store, meter, self._ids, precedents).run(report, every)
        return _free(plan, message, store, values, report, every)

    def check(self, message: Run, store: Store) -> None:
        """Raise `ProgramError` if there is no such program, or it has other numbers of inputs and outputs, or the ids
        are taken."""
        _check_counts(self.program(message.digest), message)
        _check_new(message.outs, store)

    def updates(self, digest: str) -> bool:
        """Whether a run of this program was to change inputs, as far as is known."""
        plan = self._plans.get(digest)
        return plan is None or any(item.updates for item in plan.program.inputs)


def _check_counts(program: Program, message: Run) -> None:
    if (len(message.inputs), len(message.outs), len(message.numbers)) == (
        len(program.inputs), len(program.outputs), len(program.numbers),
    ):  # fmt: skip
        return
    for what, given, expected in (
        ("inputs", message.inputs, program.inputs),
        ("outputs", message.outs, program.outputs),
        ("numbers", message.numbers, program.numbers),
    ):
        if len(given) != len(expected):
            raise ProgramError(f"this program has {len(expected)} {what}, and {len(given)} were given")


def _check_new(outs: tuple[int, ...], store: Store) -> None:
    for out in outs:
        if out <= HOLE or out in store:
            raise ProgramError(f"%{out} is bound already, or no id; bind each id once")
    if len(set(outs)) < len(outs):
        raise ProgramError("an id is to be bound twice; bind each id once")


def _value(ref: int, store: Store) -> Any:
    """A slot's tensor, or why there is none: then the calls that read it fail."""
    try:
        return store[ref]
    except (Missing, Failed) as error:
        return error


def _free(plan: Plan, message: Run, store: Store, values: list[Any], report: Report, every: int) -> Iterator[None]:
    registers = plan.registers(values, message.numbers)
    yield from plan.run(registers, report, every)
    for out, value in zip(message.outs, plan.outputs(registers), strict=True):
        if not isinstance(value, Missing):  # an input that is not there, and an output as well
            store[out] = value
