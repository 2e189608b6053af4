"""A worker's side of recorded programs: what it refuses to keep or run; its two ways to run agree with the plain one.

Most programs here are written by hand, since an attacker does not use pointers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from housecall.program.call import HOLE, Call, Complex, Input, Items, Program, Symbol
from housecall.program.check import check
from housecall.program.flow import flow, input_writes
from housecall.program.run import Randomness, computing, overload, run
from housecall.program.typing import type_of
from housecall.transport.arrays import share
from housecall.types import Label, Ref, TensorType
from housecall.wire.messages import Array, Define, Drop, Failure, Fetch, Frame, Heard, Message, Put, Reply, Run, Value
from housecall.worker.limits import UNLIMITED, Limits
from housecall.worker.plan import _DIRECT
from housecall.worker.plans import MOST_CALLS, MOST_PROGRAMS, Plans
from housecall.worker.worker import Worker, WorkerSession

FIXED = settings(deadline=None, database=None, derandomize=True)
BOUNDED = Limits(session_bytes=10**8, slots=1000, call_bytes=10**7, call_flops=10**9, compute_s=None)
F3 = TensorType("float32", (3,), (1,))
X, Y = Ref(1), Ref(2)


def call(op: str, *args: Any, outs: tuple[int, ...] = (), **kwargs: Any) -> Call:
    return Call(op, args, kwargs, outs)


def program(*calls: Call, outputs: Any = (), updates: bool = False, numbers: Any = ()) -> Program:
    """A program of x and y: float32[3]; x may be updated."""
    return Program((Input("x", 1, F3, updates), Input("y", 2, F3)), calls, outputs, numbers)


ADD = program(call("add.Tensor", X, Y, outs=(3,)), outputs=(("sum", 3),))
STEP = program(
    call("mul.Tensor", Y, Ref(9), outs=(3,)),
    call("add_.Tensor", X, Ref(3), alpha=2),
    call("sum.default", X, outs=(4,)),
    outputs=(("total", 4),),
    updates=True,
    numbers=(("rate", 9),),
)


def put(ref: int, *values: float) -> Put:
    return Put(ref, Array(None, torch.tensor(values)))


class World:
    """One session, spoken to in frames."""

    def __init__(self, limits: Limits = UNLIMITED) -> None:
        self.door: WorkerSession = Worker("w", limits).open("mallory")
        self.frames = 0

    def __call__(self, *messages: Message) -> Reply:
        self.frames += 1
        return self.door.handle(Frame(self.frames, messages))

    def value(self, ref: int) -> Any:
        (result,) = self(Fetch((ref,))).results
        assert isinstance(result, Value)
        (found,) = result.arrays
        return found.reason if isinstance(found, Failure) else found.data.tolist()


@pytest.fixture(params=["free", "metered"])
def world(request: pytest.FixtureRequest) -> World:
    world = World(BOUNDED if request.param == "metered" else UNLIMITED)
    world(put(10, 1.0, 2.0, 3.0), put(11, 1.0, 1.0, 1.0))
    return world


def held(world: World) -> dict[int, Any]:
    return {ref: value.tolist() for ref, value in world.door.store.tensors().items()}


# -- what runs ----------------------------------------------------------------------------------------------


def test_a_program_is_defined_once_and_run_by_its_digest(world: World) -> None:
    reply = world(Define(ADD), Run(ADD.digest, (10, 11), (20,)), Define(ADD), Run(ADD.digest, (20, 11), (21,)))
    assert reply.failures == ()
    assert world.value(20) == [2.0, 3.0, 4.0]
    assert world.value(21) == [3.0, 4.0, 5.0]


def test_updates_and_numbers(world: World) -> None:
    reply = world(Define(STEP), Run(STEP.digest, (10, 11), (20,), (0.5,)), Run(STEP.digest, (10, 11), (21,), (-1.0,)))
    assert reply.failures == ()
    assert [world.value(ref) for ref in (10, 20, 21)] == [[0.0, 1.0, 2.0], 9.0, 3.0]


def test_nothing_is_left_of_what_was_made_on_the_way(world: World) -> None:
    world(Define(STEP), Run(STEP.digest, (10, 11), (20,), (0.5,)))
    assert held(world).keys() == {10, 11, 20}
    assert not world.door.store.cells or world.door.store.cells.keys() == {10, 11, 20}
    world(Drop((10,)), Drop((11,)), Drop((20,)))
    assert world.door.store.held == 0


def test_outputs_that_are_inputs_or_twice_the_same(world: World) -> None:
    made = program(call("neg.default", X, outs=(3,)), outputs=(("a", 3), ("b", 3), ("c", 1)))
    assert world(Define(made), Run(made.digest, (10, 10), (20, 21, 22))).failures == ()
    assert [world.value(ref) for ref in (20, 21, 22)] == [[-1.0, -2.0, -3.0]] * 2 + [[1.0, 2.0, 3.0]]
    world(Drop((20,)), Drop((10,)))
    assert [world.value(ref) for ref in (21, 22)] == [[-1.0, -2.0, -3.0], [1.0, 2.0, 3.0]]


# -- what is not kept ---------------------------------------------------------------------------------------

BAD: dict[str, Callable[[], Program]] = {
    "operator 'evil.default' is not in the table": lambda: program(call("evil.default", X, outs=(3,))),
    "operator 'set_.source_Tensor' is not in the table": lambda: program(call("set_.source_Tensor", X, Y)),
    "%7 is used before it is bound": lambda: program(call("neg.default", Ref(7), outs=(3,))),
    "%1 is bound already": lambda: program(call("neg.default", X, outs=(1,))),
    "output 'z' is %9, which nothing binds": lambda: program(outputs=(("z", 9),)),
    "'self' is an input of the program, or a view of one, and would be written": lambda: program(
        call("add_.Tensor", X, Y)
    ),
    "'running_mean' is an input of the program, or a view of one, and would be written": lambda: program(
        call("native_batch_norm.default", Y, None, None, X, X, True, 0.1, 1e-5, outs=(3, 4, 5))
    ),
    "and its size might be changed": lambda: program(call("t_.default", X), updates=True),
    "its size might be changed": lambda: program(call("add.out", Y, Y, out=X), updates=True),
    "'dim' expects int, found str 'x'": lambda: program(call("select.int", X, "x", 0, outs=(3,))),
    "number 'n' binds %2, which is bound already": lambda: program(numbers=(("n", 2),)),
    "'self' expects Tensor, found float 0.0": lambda: program(
        call("neg.default", Ref(9), outs=(3,)), numbers=(("n", 9),)
    ),
    "'dim' expects int, found float 0.0": lambda: program(
        call("select.int", X, Ref(9), 0, outs=(3,)), numbers=(("n", 9),)
    ),
    "%9 is used before it is bound": lambda: program(
        call("cat.default", Items((X, Ref(9))), outs=(3,)), numbers=(("n", 9),)
    ),
    "'end' expects Scalar, found Ref": lambda: program(call("arange.default", Ref(9), outs=(3,)), numbers=(("n", 9),)),
    "output 'n' is %9, which nothing binds": lambda: program(outputs=(("n", 9),), numbers=(("n", 9),)),
    "input 'x': unknown dtype 'floaty'": lambda: Program((Input("x", 1, TensorType("floaty", (3,), (1,))),), (), ()),
    "is no tensor's type": lambda: Program((Input("x", 1, TensorType("float32", (-3,), (1,))),), (), ()),
    "unknown device 'disk'": lambda: program(
        call("zeros.default", Items((2,)), outs=(3,), device=Symbol("device", "disk"))
    ),
    "a program may have 20,000 calls, this one has 1,000,000": lambda: program(
        *[call("neg.default", X, outs=(3,))] * 1_000_000
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", list(BAD))
def test_a_program_that_breaks_a_rule_is_not_kept_nor_run(world: World, text: str) -> None:
    bad = BAD[text]()
    before = held(world)
    reply = world(Define(bad), Run(bad.digest, (10, 11)[: len(bad.inputs)], (30,)[: len(bad.outputs)]))
    defined, ran = reply.failures
    assert text in defined.reason
    assert "this session has no program" in ran.reason
    assert "it was refused" in ran.reason
    assert ran.writes
    assert held(world) == before
    assert world(Define(ADD), Run(ADD.digest, (10, 11), (20,))).failures == ()


def test_many_outputs_of_one_call_are_checked_in_no_time(world: World) -> None:
    bad = program(call("split.Tensor", X, 1, outs=(*range(5, 300_000), 299_999)))
    assert "%299999 is bound already" in world(Define(bad)).failures[0].reason


def test_a_session_keeps_so_many_programs() -> None:
    world = World()
    many = [program(call("add.Scalar", X, n, outs=(3,)), outputs=(("s", 3),)) for n in range(MOST_PROGRAMS + 1)]
    reply = world(*map(Define, many))
    (failure,) = reply.failures
    assert f"keeps {MOST_PROGRAMS} programs" in failure.reason
    assert world(*map(Define, many[:-1])).failures == ()  # kept already


def test_large_programs_fill_a_session_sooner() -> None:
    world = World()
    long = "x" * (1 << 20)
    many = [program(call("add.Tensor", X, Y, outs=(3,)), outputs=((f"{n}{long}", 3),)) for n in range(17)]
    failures = world(*map(Define, many)).failures
    assert len(failures) == 2
    assert "bytes, and may keep" in failures[0].reason


# -- what is not run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (Run("0" * 64, (10, 11), (20,), (0.5,)), "has no program 000"),
        (Run("f" * 10**6, (10, 11), (20,), (0.5,)), "define it first"),
        (Run(STEP.digest, (10,), (20,), (0.5,)), "this program has 2 inputs, and 1 were given"),
        (Run(STEP.digest, (10, 11, 11), (20,), (0.5,)), "this program has 2 inputs, and 3 were given"),
        (Run(STEP.digest, (10, 11), (), (0.5,)), "this program has 1 outputs, and 0 were given"),
        (Run(STEP.digest, (10, 11), (20,), ()), "this program has 1 numbers, and 0 were given"),
        (Run(STEP.digest, (10, 11), (11,), (0.5,)), "%11 is bound already"),
        (Run(STEP.digest, (10, 11), (0,), (0.5,)), "%0 is bound already, or no id"),
        (Run(STEP.digest, (10, 11), (-5,), (0.5,)), "%-5 is bound already, or no id"),
    ],
)
def test_a_run_that_does_not_fit_changes_nothing(world: World, message: Run, text: str) -> None:
    world(Define(STEP))
    before = held(world)
    (failure,) = world(message).failures
    assert text in failure.reason
    assert failure.writes
    assert held(world) == before


def test_inputs_that_do_not_fit_make_the_calls_fail_that_read_them(world: World) -> None:
    world(Define(STEP), put(12, 1.0, 2.0, 3.0, 4.0))
    (failure,) = world(Run(STEP.digest, (10, 12), (20,), (0.5,))).failures
    assert (failure.operator, failure.call, failure.writes) == ("add_.Tensor", 1, True)
    assert "must match the size of tensor b (4)" in failure.reason
    assert (world.value(10), world.value(20)) == ([1.0, 2.0, 3.0], 6.0)


def test_two_outputs_under_one_id(world: World) -> None:
    made = program(call("neg.default", X, outs=(3,)), outputs=(("a", 3), ("b", 1)))
    assert "an id is to be bound twice" in world(Define(made), Run(made.digest, (10, 11), (20, 20))).failures[0].reason


@pytest.mark.parametrize("absent", [99, 1 << 64])
def test_what_reads_an_input_that_is_not_there_fails_and_the_rest_is_done(world: World, absent: int) -> None:
    first, second = world(Define(STEP), Run(STEP.digest, (10, absent), (20,), (0.5,))).failures
    assert (first.operator, first.call, first.writes) == ("mul.Tensor", 0, False)
    assert (second.operator, second.call, second.writes) == ("mul.Tensor", 0, True)  # a write that was not done
    assert f"no slot {absent} in this session" in first.reason == second.reason
    assert world.value(20) == 6.0
    assert world.value(10) == [1.0, 2.0, 3.0]


def test_an_input_that_failed_is_the_reason(world: World) -> None:
    world(Define(ADD), call("mm.default", Ref(10), Ref(11), outs=(15,)))
    assert world(Run(ADD.digest, (10, 15), (20,))).failures == ()  # it was said of the mm
    assert "expected to be a 2D tensor" in world.value(20) or "must be" in world.value(20)
    twice = Program(ADD.inputs, (*ADD.calls, call("neg.default", X, outs=(4,))), (*ADD.outputs, ("other", 4)))
    world(Define(twice), Run(twice.digest, (10, 15), (21, 22)))
    assert world.value(21) == world.value(20)
    assert world.value(22) == [-1.0, -2.0, -3.0]


def test_a_failure_in_the_middle_leaves_the_rest_done(world: World) -> None:
    bad = program(
        call("neg.default", Y, outs=(3,)),
        call("add_.Tensor", X, Y),
        call("index_select.default", Ref(3), 0, Ref(5), outs=(6,)),
        outputs=(("z", 6), ("n", 3)),
        updates=True,
    )
    at = Input("at", 5, TensorType("int64", (1,), (1,)))
    bad = Program((*bad.inputs, at), bad.calls, bad.outputs)
    world(Define(bad), Put(12, Array(None, torch.tensor([7]))))
    (failure,) = world(Run(bad.digest, (10, 11, 12), (20, 21))).failures
    assert (failure.operator, failure.call, failure.writes) == ("index_select.default", 2, False)
    assert failure.reason == world.value(20) == "IndexError: index out of range in self"
    assert held(world) == {10: [2.0, 3.0, 4.0], 11: [1.0, 1.0, 1.0], 12: [7], 21: [-1.0, -1.0, -1.0]}
    reads = call("add_.Tensor", X, Ref(6))
    worse = Program(bad.inputs, (bad.calls[0], bad.calls[2], reads, bad.calls[1]), bad.outputs)
    told = world(Heard(world.frames), Define(worse), Run(worse.digest, (10, 11, 12), (22, 23)))
    assert [(failure.call, failure.writes) for failure in told.failures] == [(1, False), (1, True), (1, True)]
    assert told.undone == ((2, 2), (2, 3))  # after a failure nothing is changed in place
    assert held(world)[10] == [2.0, 3.0, 4.0]
    assert held(world)[23] == [-1.0, -1.0, -1.0]


def test_a_result_that_is_none(world: World) -> None:
    """A backward with a mask gives no gradient there; a program that reads it fails, as the plain twin does."""
    long, short = TensorType("float32", (1, 1, 3), (3, 3, 1)), TensorType("float32", (1, 1, 2), (2, 2, 1))
    rest = Items((1,)), Items((0,)), Items((1,)), False, Items((0,)), 1
    made = Program(
        (Input("x", 1, long), Input("w", 2, short)),
        (
            call("convolution.default", X, Y, None, *rest, outs=(3,)),
            call(
                "convolution_backward.default", Ref(3), X, Y, None, *rest, Items((False, True, False)),
                outs=(4, 5, HOLE),
            ),
        ),
        (("w", 5),),
    )  # fmt: skip
    reads = Program(made.inputs, made.calls, (("x", 4), ("w", 5)))
    world(Put(20, Array(None, torch.randn(1, 1, 3))), Put(21, Array(None, torch.randn(1, 1, 2))))
    assert world(Define(made), Run(made.digest, (20, 21), (30,))).failures == ()
    (failure,) = world(Define(reads), Run(reads.digest, (20, 21), (31, 32))).failures
    assert "none" in failure.reason


# -- limits -------------------------------------------------------------------------------------------------


def limited(**replaced: Any) -> World:
    world = World(Limits(**{"session_bytes": 10**6, "slots": 20, "call_bytes": 10**5, "call_flops": 10**6, **replaced}))
    world(put(10, 1.0, 2.0, 3.0), put(11, 1.0, 1.0, 1.0))
    return world


@pytest.mark.parametrize(
    ("calls", "text"),
    [
        ([call("expand.default", X, Items((10**9, 3)), outs=(3,)), call("clone.default", Ref(3), outs=(4,))], "bytes"),
        ([call("zeros.default", Items((10**6,)), outs=(3,), device=Symbol("device", "cpu"))], "4,000,000 bytes"),
        ([call("neg.default", X, outs=(3 + n,)) for n in range(30)], "needs a slot"),
    ],
)
def test_a_run_is_held_to_the_limits_of_its_calls(calls: list[Call], text: str) -> None:
    world = limited()
    outs = [out for one in calls for out in one.outs]
    made = program(*calls, call("cat.default", Items(tuple(map(Ref, outs))), outs=(99,)), outputs=(("z", 99),))
    failures = world(Define(made), Run(made.digest, (10, 11), (50,))).failures
    assert failures
    assert all("LimitError" in failure.reason and text in failure.reason for failure in failures)
    assert text in world.value(50)
    world(Drop((50,)))
    assert held(world).keys() == {10, 11}
    assert world.door.store.held == 24


def test_a_run_ends_when_the_time_is_used_up() -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    worker = Worker("w", Limits(compute_s=50.0), clock=clock)
    door = worker.open("mallory")
    calls = [
        call("neg.default", Ref(1), outs=(3,)),
        *(call("neg.default", Ref(n), outs=(n + 1,)) for n in range(3, 500)),
    ]
    made = program(*calls, outputs=(("z", 500),))
    (failure,) = door.handle(
        Frame(1, (put(10, 1.0, 1.0, 1.0), Define(made), Run(made.digest, (10, 10), (20,))))
    ).failures
    assert "used up its 50 s" in failure.reason
    assert failure.call is not None
    assert 10 < failure.call < 60


def test_memory_is_freed_as_a_run_goes() -> None:
    world = limited(session_bytes=50_000)
    big = Program(
        (Input("x", 1, TensorType("float32", (2500,), (1,))),),
        tuple(call("neg.default", Ref(n), outs=(n + 1,)) for n in range(1, 100)),
        (("z", 100),),
    )
    world(Define(big), Put(12, Array(None, torch.ones(2500))))
    assert world(Run(big.digest, (12,), (20,))).failures == ()


# -- the twins agree ----------------------------------------------------------------------------------------

_UNARY = (
    "neg.default",
    "exp.default",
    "t.default",
    "relu.default",
    "sum.default",
    "clone.default",
    "bernoulli.default",
)
_BINARY = ("add.Tensor", "mul.Tensor", "sub.Tensor", "maximum.default")
_WRITES = ("add_.Tensor", "mul_.Tensor")


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Programs of two (2, 2) inputs, one of which may be updated, with lists, holes, numbers and random operators."""
    values, calls, following = [1, 2], [], 10
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(("unary", "binary", "write", "number", "cat", "max", "split", "equal", "foreach")))
        one, other = Ref(draw(st.sampled_from(values))), Ref(draw(st.sampled_from(values)))
        if kind == "unary":
            calls.append(call(draw(st.sampled_from(_UNARY)), one, outs=(following,)))
        elif kind == "binary":
            op = draw(st.sampled_from(_BINARY))
            named = {"alpha": draw(st.integers(-2, 2))} if op in ("add.Tensor", "sub.Tensor") else {}
            calls.append(call(op, one, other, outs=(following,), **named))
        elif kind == "write":
            calls.append(call(draw(st.sampled_from(_WRITES)), one, other))
            continue
        elif kind == "number":
            calls.append(call("addcmul.default", one, one, other, value=Ref(5), outs=(following,)))
        elif kind == "cat":
            calls.append(call("stack.default", Items((one, other, one)), outs=(following,)))
            calls.append(call("sum.dim_IntList", Ref(following), Items((0,)), outs=(following + 1,)))
            following += 1
        elif kind == "max":
            calls.append(
                call("aminmax.default", one, outs=draw(st.sampled_from(((following, HOLE), (HOLE, following)))))
            )
        elif kind == "split":
            calls.append(call("unbind.int", one, outs=(following, following + 1)))
            following += 1
        elif kind == "foreach":
            calls.append(call("_foreach_add.Scalar", Items((one, other)), 2, outs=(following, following + 1)))
            following += 1
        else:
            calls.append(call("lerp.Scalar", one, other, 0.25, outs=(following,)))
        values.append(following)
        following += 1
    outputs = tuple((f"o{at}", draw(st.sampled_from(values))) for at in range(draw(st.integers(1, 3))))
    square = TensorType("float32", (2, 2), (2, 1))
    made = Program((Input("x", 1, square), Input("y", 2, square)), tuple(calls), outputs, (("n", 5),))
    updated = {item.id for _, item in input_writes(made)}
    inputs = tuple(Input(item.name, item.id, item.type, item.id in updated) for item in made.inputs)
    return Program(inputs, made.calls, made.outputs, made.numbers)


def outcome(run_it: Callable[[dict[str, torch.Tensor], Randomness], list[torch.Tensor]]) -> list[Any] | str:
    """What a way to run makes of the same values with the same randomness, updated inputs too; or that it fails."""
    inputs = {"x": torch.tensor([[0.5, 0.25], [1.0, 0.0]]), "y": torch.tensor([[1.0, 0.75], [0.0, 0.5]])}
    randomness = Randomness()
    randomness.follow(torch.Generator().manual_seed(3).get_state())
    try:
        with computing():
            found = run_it(inputs, randomness)
    except Exception:
        return "fails"
    return [(type_of(value), value.nan_to_num(7.0).tolist()) for value in (*found, *inputs.values())]


@pytest.mark.parametrize("size", [10, 50_000])
def test_what_is_written_over_is_the_same(size: int) -> None:
    kind = TensorType("float32", (size,), (1,))
    steps = (
        call("mul.Tensor", X, Y, outs=(3,)),
        call("relu.default", Ref(3), outs=(4,)),
        call("neg.default", Y, outs=(5,)),
        call("threshold_backward.default", Ref(5), Ref(4), 0, outs=(6,)),
    )
    made = Program((Input("x", 1, kind), Input("y", 2, kind)), steps, (("z", 6),))
    x, y = torch.randn(size), torch.randn(size)
    door = Worker("w").open("me")
    door.store.update({10: x.clone(), 11: y.clone()})
    door.handle(Frame(1, (Define(made), Run(made.digest, (10, 11), (20,)))))
    assert torch.equal(door.store[20], run(made, {"x": x, "y": y})["z"])
    assert torch.equal(door.store[10], x)
    assert torch.equal(door.store[11], y)


@FIXED
@given(programs(), st.floats(-2, 2))
def test_both_ways_to_run_agree_with_the_plain_one(made: Program, number: float) -> None:
    def plain(inputs: dict[str, torch.Tensor], randomness: Randomness) -> list[torch.Tensor]:
        found = run(made, inputs, randomness, {"n": number})
        return [found[name] for name, _ in made.outputs]

    def worker(limits: Limits) -> Callable[[dict[str, torch.Tensor], Randomness], list[torch.Tensor]]:
        def through(inputs: dict[str, torch.Tensor], randomness: Randomness) -> list[torch.Tensor]:
            door = Worker("w", limits).open("me")
            door.randomness.follow(randomness._state)
            outs = tuple(range(20, 20 + len(made.outputs)))
            for ref, value in zip((10, 11), inputs.values(), strict=True):
                (
                    door.meter.put
                    if door.meter
                    else lambda message: door.store.__setitem__(message.id, message.value.data)
                )(Put(ref, Array(None, value)))
            reply = door.handle(Frame(1, (Define(made), Run(made.digest, (10, 11), outs, (number,)))))
            assert all(not failure.reason.startswith("KeyError") for failure in reply.failures)
            assert set(door.store) == {10, 11, *outs}
            if reply.failures:
                raise ValueError
            return [door.store[out] for out in outs]

        return through

    check(made)
    names = [name for name, _ in made.outputs]
    expected = outcome(plain) if len(set(names)) == len(names) else None
    assert outcome(worker(UNLIMITED)) == expected
    assert outcome(worker(BOUNDED)) == expected


@FIXED
@given(programs())
def test_what_flow_says_of_updates_covers_what_is_written(made: Program) -> None:
    found = flow(made, {"y": Label(("ward",))})
    for _, item in input_writes(made):
        assert item.name in found


def test_a_value_that_is_turned_in_place_is_not_what_it_was() -> None:
    wide = Input("x", 1, TensorType("float32", (2, 3), (3, 1)))
    calls = (
        call("clone.default", X, outs=(3,)),
        call("t.default", Ref(3), outs=(4,)),
        call("t_.default", Ref(3)),
        call("t.default", Ref(4), outs=(5,)),
    )
    made = Program((wide,), calls, (("z", 5),))
    x = torch.arange(6.0).reshape(2, 3)
    world = World()
    assert world(Define(made), Put(10, Array(None, x)), Run(made.digest, (10,), (20,))).failures == ()
    assert world.value(20) == run(made, {"x": x})["z"].tolist() == x.tolist()


def test_every_value_on_the_way_is_freed_once() -> None:
    plans = Plans(torch.device("cpu"), Randomness())
    plans.define(STEP)
    plans.define(program(call("stack.default", Items((X, Y)), outs=(3,)), call("neg.default", Ref(3), outs=(4,))))
    for plan in plans._plans.values():
        made = [step[3] for step in plan._steps if step[3]]
        freed = [register for step in plan._steps for register in step[-1]]
        assert sorted(freed) == sorted(set(made) - set(plan._outs))


def test_freed_values_are_let_go_of() -> None:
    """A chain of 100 values of 8 MB each, of which no more than a few are there at once."""
    square = TensorType("float32", (2_000_000,), (1,))
    calls = tuple(call("neg.default", Ref(n), outs=(n + 1,)) for n in range(1, 101))
    made = Program((Input("x", 1, square),), calls, (("z", 101),))
    plans = Plans(torch.device("cpu"), Randomness())
    plans.define(made)
    (plan,) = plans._plans.values()
    alive: list[int] = []
    steps = list(plan._steps)
    number, function, arguments, *rest = steps[50]

    def looks(registers: list[Any]) -> Any:
        alive.append(sum(isinstance(value, torch.Tensor) for value in registers))
        return arguments(registers)

    steps[50] = (number, function, looks, *rest)
    plan._steps = tuple(steps)
    for _ in plan.run(plan.registers([torch.ones(2_000_000)], ()), lambda number, call, error: error):
        pass
    assert alive == [2]  # the input, and the one before


T, PROBABILITIES = torch.arange(6.0).view(2, 3), torch.arange(6.0).view(2, 3).log_softmax(1)
SAMPLES: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "_log_softmax.default": [((T, 1, False), {})],
    "_log_softmax_backward_data.default": [((T, PROBABILITIES, 1, torch.float32), {})],
    "add_.Tensor": [((T, T), {}), ((T, T), {"alpha": -0.5}), ((T, 2.5), {})],
    "addmm.default": [((T[0, :2], T, T.t()), {}), ((T[0, :2], T, T.t()), {"beta": 2, "alpha": 0.5})],
    "index_select.default": [((T, 1, torch.tensor([2, 0])), {})],
    "mm.default": [((T, T.t()), {})],
    "mul_.Tensor": [((T, T), {}), ((T, 2.5), {})],
    "ones_like.default": [
        ((T.t(),), {}),
        ((T.t(),), {"pin_memory": False, "memory_format": torch.preserve_format}),
        ((T.t(),), {"dtype": torch.int64, "layout": torch.strided, "device": torch.device("cpu"), "pin_memory": None}),
        ((T.t(),), {"dtype": None, "layout": None, "device": None, "memory_format": torch.contiguous_format}),
    ],
    "relu.default": [((T - 2,), {})],
    "sum.dim_IntList": [((T, [0], True), {}), ((T, None), {"dtype": torch.float64}), ((T, [0, -1]), {})],
    "t.default": [((T,), {})],
    "view.default": [((T, [3, -1]), {})],
}
SAMPLES["zeros_like.default"] = SAMPLES["ones_like.default"]


@pytest.mark.parametrize("name", _DIRECT)
def test_what_a_plan_calls_directly_is_the_operator(name: str) -> None:
    for args, kwargs in SAMPLES[name]:
        one, other = (tuple(arg.clone() if arg is T else arg for arg in args) for _ in range(2))
        found, expected = _DIRECT[name](*one, **kwargs), overload(name)(*other, **kwargs)
        assert type_of(found) == type_of(expected)
        assert torch.equal(found, expected)


def test_the_plan_keeps_no_text_of_the_peers() -> None:
    plans = Plans(torch.device("cpu"), Randomness())
    plans.define(ADD)
    (plan,) = plans._plans.values()
    for _, function, arguments, out, pairs, dead in plan._steps:
        assert callable(function)
        assert callable(arguments)
        assert isinstance(out, int)
        assert pairs is None or all(isinstance(number, int) for pair in pairs for number in pair)
        assert all(isinstance(register, int) for register in dead)


def test_limits_of_a_program_are_what_the_page_says() -> None:
    assert (MOST_CALLS, MOST_PROGRAMS) == (20_000, 256)
    assert Complex(0.0, 1.0) != Complex(1.0, 0.0)


@pytest.mark.parametrize("name", ["unused", "twice"])
def test_a_turn_that_may_fail_is_not_put_off(name: str) -> None:
    """Of three dimensions it fails, whether anything reads it or not, and nothing is written after that."""
    turn = Call("t.default", (Ref(1),), {}, (10,))
    calls = {
        "unused": [turn, Call("add_.Tensor", (Ref(2), Ref(2)), {}, ())],
        "twice": [turn, Call("t.default", (Ref(10),), {}, (11,)), Call("neg.default", (Ref(11),), {}, (12,))],
    }[name]
    outs = calls[-1].outs
    inputs = (
        Input("a", 1, TensorType("float32", (2, 2, 3), (6, 3, 1)), False),
        Input("b", 2, TensorType("float32", (3,), (1,)), True),
    )
    program = Program(inputs, tuple(calls), (("o", 12),) if outs else ())
    found = []
    for said in ((Define(program), Run(program.digest, (1, 2), outs)), tuple(calls)):
        door = Worker("w").open("me")
        given = Put(1, share(torch.ones(2, 2, 3))), Put(2, share(torch.ones(3)))
        reply = door.handle(Frame(1, (*given, *said)))
        value = door.store[2]
        found.append((bool(reply.failures), value.tolist(), [type(door.store[out]).__name__ for out in outs]))
    assert found[0] == found[1]
    assert found[0][0]
