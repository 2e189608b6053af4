"""Runs of programs, free and through a meter, first and later: each is its calls one by one, in all that can be seen.

Two sessions are told the same: one is given runs, the other their calls. Values, failures, writes that were not done,
labels, charges, slots and what the owner is told afterwards are compared, run after run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from housecall.errors import HousecallError
from housecall.program.call import HOLE, Call, Input, Items, Program, replaced, text
from housecall.program.check import check
from housecall.program.flow import with_updates
from housecall.program.run import last_uses
from housecall.program.typing import type_of
from housecall.transport.arrays import share
from housecall.types import Ref
from housecall.wire.messages import Define, Drop, Failure, Fetch, Frame, Heard, Load, Message, Put, Reply, Run, Seed
from housecall.worker.gate import Gate
from housecall.worker.limits import UNLIMITED, Limits
from housecall.worker.worker import Worker, WorkerSession

FIXED = settings(deadline=None, database=None, derandomize=True, max_examples=150)
ROUNDS = 4


def call(op: str, *args: Any, outs: tuple[int, ...] = (), **kwargs: Any) -> Call:
    return Call(op, args, kwargs, outs)


# -- programs at random -------------------------------------------------------------------------------------

# x and y are float32[2, 2], at int64[2] may point beyond them, n is a number.
X, Y, AT, N = 1, 2, 3, 5
INPUTS = (
    Input("x", X, type_of(torch.ones(2, 2))),
    Input("y", Y, type_of(torch.ones(2, 2))),
    Input("at", AT, type_of(torch.ones(2, dtype=torch.int64))),
)

Make = Callable[[Ref, Ref, int], list[Call]]
KINDS: dict[str, Make] = {
    "neg": lambda a, b, o: [call("neg.default", a, outs=(o,))],
    "relu": lambda a, b, o: [call("relu.default", a, outs=(o,))],
    "relu of a sum": lambda a, b, o: [
        call("add.Tensor", a, b, outs=(o,)), call("relu.default", Ref(o), outs=(o + 1,))
    ],
    "backward of relu": lambda a, b, o: [
        call("mul.Tensor", a, b, outs=(o,)), call("threshold_backward.default", Ref(o), b, 0, outs=(o + 1,))
    ],
    "turn": lambda a, b, o: [call("t.default", a, outs=(o,))],
    "view": lambda a, b, o: [call("view.default", a, Items((2, 2)), outs=(o,))],
    "diagonal": lambda a, b, o: [
        call("diagonal.default", a, outs=(o,)), call("expand.default", Ref(o), Items((2, 2)), outs=(o + 1,))
    ],
    "add": lambda a, b, o: [call("add.Tensor", a, b, alpha=Ref(N), outs=(o,))],
    "times": lambda a, b, o: [call("mul.Tensor", a, Ref(N), outs=(o,))],
    "product": lambda a, b, o: [call("mm.default", a, b, outs=(o,))],
    "rows": lambda a, b, o: [call("index_select.default", a, 0, Ref(AT), outs=(o,))],
    "stack": lambda a, b, o: [
        call("stack.default", Items((a, b)), outs=(o,)), call("sum.dim_IntList", Ref(o), Items((0,)), outs=(o + 1,))
    ],
    "largest": lambda a, b, o: [
        call("max.dim", a, 0, True, outs=(o, HOLE)), call("expand.default", Ref(o), Items((2, 2)), outs=(o + 1,))
    ],
    "root": lambda a, b, o: [call("linalg_cholesky_ex.default", a, check_errors=True, outs=(o, HOLE))],
    "draw": lambda a, b, o: [call("native_dropout.default", a, 0.5, True, outs=(o, HOLE))],
    "add_": lambda a, b, o: [call("add_.Tensor", a, b)],
    "mul_": lambda a, b, o: [call("mul_.Tensor", a, Ref(N))],
    "fill_": lambda a, b, o: [call("index_fill_.int_Scalar", a, 0, Ref(AT), 0.5)],
    "draw_": lambda a, b, o: [call("bernoulli_.float", a, 0.5)],
}  # fmt: skip


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Programs of KINDS, each call on any value so far; some of what they make is given out."""
    values, calls, following = [X, Y], [], 10
    for _ in range(draw(st.integers(1, 9))):
        name = draw(st.sampled_from(sorted(KINDS)))
        one, other = Ref(draw(st.sampled_from(values))), Ref(draw(st.sampled_from(values)))
        made = KINDS[name](one, other, following)
        calls += made
        values += [out for one_call in made for out in one_call.outs if out != HOLE and squares(one_call)]
        following += 2
    given_out = draw(st.lists(st.sampled_from(values[2:]), unique=True, max_size=3)) if values[2:] else []
    outputs = tuple((f"o{ref}", ref) for ref in given_out)
    return with_updates(Program(INPUTS, tuple(calls), outputs, (("n", N),)))


def squares(one: Call) -> bool:
    """Whether what a call of KINDS makes is float32[2, 2]."""
    return one.op not in ("stack.default", "diagonal.default", "max.dim")


# -- what is told, and how ----------------------------------------------------------------------------------


class Round(NamedTuple):
    """One run: which slots are its inputs, its number, and whether before it the caller hears of failures, or seeds."""

    x: int
    y: int
    at: int
    number: float
    hears: bool
    seeds: bool = False


# Slots: those of the owner, then those that the caller brings: three matrices, and rows that are there or not.
LENT, LENT_AT, LENT_BAD = 1, 2, 3
BROUGHT = (11, 12, 13)
GOOD, BAD = 14, 15
rounds = st.builds(
    Round,
    x=st.sampled_from((*BROUGHT, LENT)),
    y=st.sampled_from((*BROUGHT, LENT)),
    at=st.sampled_from((GOOD, GOOD, BAD, LENT_AT, LENT_BAD)),
    number=st.floats(-2, 2, width=32),
    hears=st.booleans(),
    seeds=st.booleans(),
)


class OpenGate(Gate):
    """Lets everything in and nothing out."""

    def load(self, who: Any, name: str, noted: bool | None = None) -> bool:
        return True

    def release(self, who: Any, question: Any, what: str = "", *, spends: bool = True) -> None:
        raise HousecallError(f"{question.label} stays")


class World:
    """One session, and what can be seen of it. `private`: it has loaded the owner's data."""

    def __init__(self, limits: Limits, private: bool) -> None:
        worker = Worker("clinic", limits, gate=OpenGate())
        worker.catalogue.register("heart", {"x": torch.tensor([[0.5, -1.0], [2.0, -0.25]])})
        worker.catalogue.register("labs", {"at": torch.tensor([1, 0]), "bad": torch.tensor([0, 7])})
        self.door: WorkerSession = worker.open("mallory")
        self.frames = 0
        if private:
            self.tell(Load("heart", (LENT,)), Load("labs", (LENT_AT, LENT_BAD)))
        generator = torch.Generator().manual_seed(4)
        matrices = [torch.randn(2, 2, generator=generator) for _ in BROUGHT]
        matrices[2] = torch.cat([matrices[2], matrices[2]])[1:3]  # another place of a storage
        self.tell(Seed(share(generator.get_state())))
        self.tell(*(Put(ref, share(matrix)) for ref, matrix in zip(BROUGHT, matrices, strict=True)))
        self.tell(Put(GOOD, share(torch.tensor([1, 1]))), Put(BAD, share(torch.tensor([1, -9]))))
        if not private:
            self.tell(Put(LENT, share(torch.ones(2, 2))))
            self.tell(Put(LENT_AT, share(torch.tensor([0, 0]))), Put(LENT_BAD, share(torch.tensor([0, 7]))))

    def tell(self, *messages: Message) -> Reply:
        self.frames += 1
        return self.door.handle(Frame(self.frames, messages))

    def before(self, one: Round) -> list[Message]:
        """What is said before a run."""
        heard = [Heard(self.frames)] if one.hears else []
        seed = [Seed(share(torch.Generator().manual_seed(5).get_state()))] if one.seeds else []
        return [*heard, *seed]

    def seen(self, outs: tuple[int, ...]) -> Any:
        """Everything that is there now, for the caller and for the owner."""
        store = self.door.store
        (found,) = self.tell(Fetch(outs)).results
        values = [item.reason if isinstance(item, Failure) else repr(item.data) for item in found.arrays]
        cells = {ref: (cell.label, cell.failed, cell.nbytes, cell.slots) for ref, cell in store.cells.items()}
        specs = {ref: str(spec.type) for ref, spec in store.specs.items()}
        held = {
            ref: str(value) if isinstance(value, Exception) else (repr(value), value.stride(), value.storage_offset())
            for ref, value in store.items()
        }
        shared = sorted(
            sorted(ref for ref, cell in store.cells.items() if cell is one) for one in set(store.cells.values())
        )
        return values, cells, specs, held, shared, store.held, store.drawn

    def history(self, outs: tuple[int, ...]) -> list[str]:
        """What the owner would read of these."""
        store = self.door.store
        if self.door.meter is None:
            return []
        return [text(self.door.meter.history.program((out,), store)) for out in outs if store.label(out)]


class Runs(World):
    """Is given runs."""

    def do(self, program: Program, one: Round, outs: tuple[int, ...]) -> tuple[set[Any], set[Any]]:
        run = Run(program.digest, (one.x, one.y, one.at), outs, (one.number,))
        reply = self.tell(*self.before(one), Define(program), run)
        assert all(failure.call is not None for failure in reply.failures if failure.frame == reply.number), reply
        told = {(failure.operator, failure.call, failure.reason, failure.writes) for failure in reply.failures}
        return told, {number for _, number in reply.undone}


class Calls(World):
    """Is given the calls of runs one by one, each with the drops of what no later one reads."""

    def __init__(self, limits: Limits, private: bool) -> None:
        super().__init__(limits, private)
        self.fresh = iter(range(10_000, 20_000))
        self.numbers: dict[tuple[int, int], int] = {}  # frame and message -> number of the call in its program

    def do(self, program: Program, one: Round, outs: tuple[int, ...]) -> tuple[set[Any], set[Any]]:
        slots = {X: one.x, Y: one.y, AT: one.at}
        slots.update((ref, out) for (_, ref), out in zip(program.outputs, outs, strict=True))
        dead = last_uses(program)
        messages = self.before(one)

        def placed(ref: Ref) -> Any:
            return one.number if ref.id == N else Ref(slots[ref.id])

        for number, each in enumerate(program.calls):
            for out in each.outs:
                if out != HOLE:
                    slots.setdefault(out, next(self.fresh))
            self.numbers[self.frames + 1, len(messages)] = number
            messages.append(replaced(each, placed, tuple(out and slots[out] for out in each.outs)))
            gone = [slots[ref] for ref in dead.get(number, ()) if ref not in (X, Y, AT, N)]
            messages += [Drop(tuple(gone))] if gone else []
        reply = self.tell(*messages)
        told = {
            (failure.operator, self.numbers[failure.frame, failure.index], failure.reason, failure.writes)
            for failure in reply.failures
        }
        return told, {self.numbers[reply.number, index] for index, _ in reply.undone}


class Log(logging.Handler):
    """What the owner's log says."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def since(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines


@pytest.fixture
def log() -> Iterator[Log]:
    logger, found = logging.getLogger("housecall.worker.private"), Log()
    logger.addHandler(found)
    logger.propagate = False
    yield found
    logger.propagate = True
    logger.removeHandler(found)


BOUNDED = Limits(session_bytes=10**8, slots=1000, call_bytes=10**7, call_flops=10**9, compute_s=None)


def agree(limits: Limits, private: bool, program: Program, told: list[Round], log: Log) -> int:
    """One session is told these runs, another their calls; how many precedents the first had at the end."""
    check(program)
    runs, calls = Runs(limits, private), Calls(limits, private)
    outs: tuple[int, ...] = ()
    for number, one in enumerate(told):
        outs = tuple(range(100 * (number + 1), 100 * (number + 1) + len(program.outputs)))
        assert (runs.do(program, one, outs), log.since()) == (calls.do(program, one, outs), log.since())
        assert runs.seen(outs) == calls.seen(outs)
        assert runs.history(outs) == calls.history(outs)
    return sum(len(plan.precedents) for plan in runs.door.plans._plans.values())


WORLDS = [(UNLIMITED, False), (BOUNDED, False), (UNLIMITED, True), (BOUNDED, True)]


@pytest.mark.parametrize(("limits", "private"), WORLDS)
def test_a_run_is_its_calls_one_by_one(limits: Limits, private: bool, log: Log) -> None:
    again = 0

    @FIXED
    @given(programs(), st.lists(rounds, min_size=ROUNDS, max_size=ROUNDS), st.integers(0, 2))
    def alike(program: Program, told: list[Round], repeated: int) -> None:
        nonlocal again
        again += agree(limits, private, program, [*told, *told[:repeated]], log)

    alike()
    assert again > 100 or (limits, private) == (UNLIMITED, False)


def fill(ref: int) -> Call:
    return call("index_fill_.int_Scalar", Ref(ref), 0, Ref(AT), 0.5)


# What few programs at random do: a later run in which something fails that did not before. The calls, what is given
# out, and which slot is x in every round; y is the owner's.
LATER: dict[str, tuple[list[Call], int | None, int, int]] = {
    "a public write fails, so a private one is not done": (
        [fill(X), call("add.Tensor", Ref(Y), Ref(Y), outs=(10,)), call("add_.Tensor", Ref(10), Ref(Y))], 10, 11, LENT,
    ),
    "a private write fails, and what was written is known to be wrong": (
        [call("add_.Tensor", Ref(X), Ref(Y)), fill(X)], None, 11, LENT,
    ),
    "what is read of a private failure is wrong as well": (
        [call("index_select.default", Ref(Y), 0, Ref(AT), outs=(10,)), call("neg.default", Ref(10), outs=(11,))],
        11, 11, LENT,
    ),
    "what would have been private is not, since the write was not done": (
        [
            fill(X), call("neg.default", Ref(X), outs=(10,)), call("add_.Tensor", Ref(10), Ref(Y)),
            call("index_select.default", Ref(10), 0, Ref(AT), outs=(11,)),
        ],
        11, 11, LENT,
    ),
    "what was drawn after a private draw is private": (
        [
            fill(X), call("native_dropout.default", Ref(Y), 0.5, True, outs=(10, HOLE)),
            call("native_dropout.default", Ref(X), 0.5, True, outs=(11, HOLE)),
        ],
        11, 11, LENT,
    ),
    "what a kernel would trust is looked at": (
        [call("embedding_dense_backward.default", Ref(Y), Ref(AT), 9, -1, False, outs=(11,))], 11, 11, LENT,
    ),
    "a view that nobody keeps is part of the story": (
        [call("add.Tensor", Ref(X), Ref(Y), outs=(10,)), call("t.default", Ref(Y), outs=(12,))], 10, 11, LENT,
    ),
}  # fmt: skip


# A session that is not guarded has only its own process to lose, and there nobody looks.
CASES = [(*world, what) for world in WORLDS for what in LATER if world != WORLDS[0] or "trust" not in what]


# Values that seem to be there for the taking, and are not: another call, an output or a view still reads them.
REUSED: dict[str, tuple[list[Call], tuple[int, ...]]] = {
    "read again": (
        [call("add.Tensor", Ref(X), Ref(Y), outs=(10,)), call("relu.default", Ref(10), outs=(11,)),
         call("mul.Tensor", Ref(10), Ref(11), outs=(12,))], (12,),
    ),
    "given out": ([call("neg.default", Ref(X), outs=(10,)), call("relu.default", Ref(10), outs=(11,))], (10, 11)),
    "seen through a view": (
        [call("neg.default", Ref(X), outs=(10,)), call("t.default", Ref(10), outs=(11,)),
         call("relu.default", Ref(10), outs=(12,)), call("mul.Tensor", Ref(11), Ref(12), outs=(13,))], (13,),
    ),
    "both of its arguments": (
        [call("neg.default", Ref(X), outs=(10,)),
         call("threshold_backward.default", Ref(10), Ref(10), 0, outs=(11,))], (11,),
    ),
    "the input itself": ([call("relu.default", Ref(X), outs=(10,))], (10,)),
    "a view of the input": (
        [call("t.default", Ref(X), outs=(10,)), call("relu.default", Ref(10), outs=(11,))], (11,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REUSED)
@pytest.mark.parametrize(("limits", "private"), WORLDS)
def test_what_is_not_free_is_not_written_over(limits: Limits, private: bool, what: str, log: Log) -> None:
    calls, given_out = REUSED[what]
    program = with_updates(Program(INPUTS, tuple(calls), tuple((f"o{ref}", ref) for ref in given_out), (("n", N),)))
    agree(limits, private, program, [Round(x, 12, GOOD, 1.0, hears=True) for x in (11, 11, LENT, LENT, 13)], log)


@pytest.mark.parametrize("hears", [False, True])
@pytest.mark.parametrize(("limits", "private", "what"), CASES)
def test_later_runs_that_fail_otherwise(limits: Limits, private: bool, what: str, hears: bool, log: Log) -> None:
    calls, given_out, x, y = LATER[what]
    outputs = () if given_out is None else (("o", given_out),)
    program = with_updates(Program(INPUTS, tuple(calls), outputs, (("n", N),)))
    # x has the owner's label after the first round, so the second is the first of its kind.
    told = [Round(x, y, at, 1.0, hears, seeds=True) for at in (GOOD, GOOD, BAD, GOOD, BAD, BAD, GOOD)]
    precedents = agree(limits, private, program, told, log)
    assert precedents or (limits, private) == (UNLIMITED, False)
