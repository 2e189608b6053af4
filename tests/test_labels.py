"""Labels follow every operation and every alias; what is private does not show, not even by failing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from housecall.errors import ProgramError
from housecall.program.call import Call, Input, Items, Program
from housecall.program.check import check
from housecall.program.flow import flow
from housecall.program.typing import type_of
from housecall.transport.arrays import share
from housecall.transport.parcel import packed
from housecall.types import PUBLIC, Label, Ref
from housecall.wire.messages import Clear, Define, Describe, Drop, Fetch, Frame, Load, Put, Reply, Run, Seed
from housecall.worker.gate import Gate
from housecall.worker.private import FAILED
from housecall.worker.worker import Worker, WorkerSession

FIXED = settings(deadline=None, database=None, derandomize=True, max_examples=150)
HEART, LABS = Label(("heart",)), Label(("labs",))


# -- the algebra ------------------------------------------------------------------------------------------

LABELS = st.lists(st.sampled_from(["heart", "labs", "voices"]), max_size=3).map(
    lambda names: Label(tuple(sorted(set(names))), ("voices",) * ("voices" in names))
)


@FIXED
@given(LABELS, LABELS, LABELS)
def test_joining_is_a_semilattice(a: Label, b: Label, c: Label) -> None:
    assert a | b == b | a
    assert (a | b) | c == a | (b | c)
    assert a | a == a
    assert a | PUBLIC == a == PUBLIC | a
    assert bool(a) == (a != PUBLIC)
    assert {name: (a | b).unit(name) for name in (a | b).sources} == {
        name: "person" if name == "voices" else "record" for name in {*a.sources, *b.sources}
    }


def test_a_label_prints_its_sources() -> None:
    assert str(HEART | LABS) == "heart + labs"
    assert str(Label(("voices",), ("voices",)) | HEART) == "heart + voices (person)"
    assert str(PUBLIC) == "public"


def test_what_derives_from_the_same_shares_a_label() -> None:
    """Each call joins labels: what joins nothing new makes none."""
    both = HEART | LABS
    assert both | Label(("heart", "labs")) is both
    assert both | HEART is both
    assert LABS | both is both
    assert both | PUBLIC is both
    assert PUBLIC | both is both


# -- a session with private data ----------------------------------------------------------------------------


class OpenGate(Gate):
    """Lets everything in and nothing out."""

    def load(self, who: Any, name: str, noted: bool | None = None) -> bool:
        return True

    def release(self, who: Any, question: Any, what: str = "", *, spends: bool = True) -> None:
        from housecall.errors import HousecallError

        raise HousecallError(f"{question.label} stays")


def session(**data: torch.Tensor) -> WorkerSession:
    """A session that has loaded data sets of one column each, at ids 1, 2, ... in order of name."""
    worker = Worker("clinic", gate=OpenGate())
    door = worker.open("mallory")
    for number, (name, column) in enumerate(sorted(data.items()), start=1):
        worker.catalogue.register(name, {"x": column})
        assert not door.handle(Frame(number, (Load(name, (number,)),))).failures
    return door


def done(door: WorkerSession, *calls: Call) -> Reply:
    return door.handle(Frame(99, calls))


X = torch.arange(12.0).view(3, 4) + 1


def test_results_have_the_labels_of_all_arguments() -> None:
    door = session(heart=X, labs=X + 1)
    door.handle(Frame(9, (Put(5, share(torch.ones(3, 4))),)))
    reply = done(
        door,
        Call("add.Tensor", (Ref(1), Ref(2)), {}, (10,)),
        Call("mul.Tensor", (Ref(5), 2.0), {}, (11,)),
        Call("cat.default", (Items((Ref(5), Ref(1))),), {}, (12,)),
        Call("mul.Tensor", (Ref(11), Ref(2)), {}, (13,)),
        Call("max.dim", (Ref(1), 1), {}, (14, 15)),
        Call("zeros_like.default", (Ref(1),), {}, (16,)),
    )
    assert reply.failures == ()
    labels = {ref: door.store.label(ref) for ref in range(10, 17)}
    assert labels == {10: HEART | LABS, 11: PUBLIC, 12: HEART, 13: LABS, 14: HEART, 15: HEART, 16: HEART}


def test_a_write_labels_every_alias_of_the_storage() -> None:
    door = session(heart=X)
    done(
        door,
        Call("ones_like.default", (Ref(1),), {}, (10,)),
    )
    door.handle(Frame(2, (Put(5, share(torch.ones(3, 4))), Put(6, share(torch.ones(3, 4))))))
    reply = done(
        door,
        Call("t.default", (Ref(5),), {}, (20,)),
        Call("select.int", (Ref(20), 0, 1), {}, (21,)),
        Call("select.int", (Ref(1), 0, 0), {}, (22,)),
        Call("select.int", (Ref(22), 0, 0), {}, (23,)),
        Call("add_.Tensor", (Ref(21), Ref(23)), {}, ()),
        Call("sum.default", (Ref(5),), {}, (24,)),
    )
    assert reply.failures == ()
    assert [door.store.label(ref) for ref in (5, 20, 21, 24)] == [HEART] * 4
    assert door.store.label(6) == PUBLIC


def test_out_arguments_and_positions_carry_labels() -> None:
    door = session(heart=torch.tensor([0, 1, 1]))
    door.handle(Frame(2, (Put(5, share(torch.randn(3))), Put(6, share(torch.zeros(3))))))
    done(
        door,
        Call("index_select.default", (Ref(5), 0, Ref(1)), {}, (10,)),
        Call("index.Tensor", (Ref(5), Items((Ref(1),))), {}, (11,)),
        Call("add.out", (Ref(10), Ref(10)), {"out": Ref(6)}, ()),
    )
    assert door.store.label(10) == door.store.label(11) == HEART
    assert door.store.label(6) == HEART


def test_nothing_labelled_leaves_and_what_is_public_does() -> None:
    door = session(heart=X)
    door.handle(Frame(2, (Put(5, share(torch.ones(2))),)))
    done(door, Call("sum.default", (Ref(1),), {}, (10,)))
    (result,) = door.handle(Frame(3, (Fetch((1, 10, 5)),))).results
    assert [type(item).__name__ for item in result.arrays] == ["Failure", "Failure", "Array"]
    assert result.arrays[0].operator == "release"
    assert "heart stays" in result.arrays[0].reason


@pytest.mark.parametrize(
    "call",
    [
        Call("nonzero.default", (Ref(1),), {}, (10,)),
        Call("masked_select.default", (Ref(5), Ref(2)), {}, (10,)),
        Call("_unique2.default", (Ref(1),), {}, (10, 11, 12)),
        Call("repeat_interleave.Tensor", (Ref(3),), {}, (10,)),
        Call("bincount.default", (Ref(3),), {}, (10,)),
        Call("index.Tensor", (Ref(5), Items((Ref(2),))), {}, (10,)),
    ],
    ids=lambda call: call.op,
)
def test_shapes_that_depend_on_private_elements_are_refused(call: Call) -> None:
    door = session(a=X, b=X > 3, c=torch.arange(3))
    door.handle(Frame(5, (Put(5, share(X)),)))
    (failure,) = done(door, call).failures
    assert "depends on elements" in failure.reason or "not in the table" in failure.reason
    assert not any(isinstance(value, torch.Tensor) for ref, value in door.store.items() if ref >= 10)


def test_a_private_call_that_fails_does_not_say_so() -> None:
    good, bad = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 99])
    seen = []
    for positions in (good, bad):
        door = session(heart=positions)
        door.handle(Frame(2, (Put(5, share(torch.arange(3.0))),)))
        reply = done(
            door,
            Call("index_select.default", (Ref(5), 0, Ref(1)), {}, (10,)),
            Call("add.Tensor", (Ref(10), 1.0), {}, (11,)),
            Call("add_.Tensor", (Ref(5), Ref(11)), {}, ()),
        )
        described = door.handle(Frame(3, (Describe((10, 11, 5)),)))
        seen.append((reply, described))
        assert door.store.cells[11].failed == (positions is bad)
        assert door.store.cells[5].failed == (positions is bad)
    assert seen[0] == seen[1]
    assert seen[0][0].failures == ()


def test_a_failure_is_told_in_one_sentence_where_a_release_is_allowed() -> None:
    door = session(heart=torch.tensor([0, 99]))

    class Allowing(OpenGate):
        def release(self, who: Any, question: Any, what: str = "", *, spends: bool = True) -> None:
            pass

    door.worker.gate = Allowing()  # type: ignore[assignment]
    door.handle(Frame(2, (Put(5, share(torch.arange(3.0))),)))
    done(door, Call("index_select.default", (Ref(5), 0, Ref(1)), {}, (10,)))
    (result,) = door.handle(Frame(3, (Fetch((10, 1)),))).results
    assert result.arrays[0].reason == FAILED
    assert torch.equal(result.arrays[1].data, torch.tensor([0, 99]))


# -- programs at random -------------------------------------------------------------------------------------

SHAPE = (3, 4)
UNARY = [
    "sin.default",
    "neg.default",
    "relu.default",
    "t.default",
    "clone.default",
    "zeros_like.default",
    "squeeze.default",
]
BINARY = ["add.Tensor", "mul.Tensor", "maximum.default"]
WRITES = ["add_.Tensor", "mul_.Tensor", "copy_.default"]


def programs(seed: int, calls: int = 12) -> tuple[Program, dict[str, Label]]:
    """A random program over square values: inputs `p0`, `p1` public, `s0`, `s1` secret, which are cloned first."""
    rng = random.Random(seed)
    names = ["p0", "p1", "s0", "s1"]
    type_ = type_of(torch.ones(4, 4))
    inputs = tuple(Input(name, number, type_) for number, name in enumerate(names, start=1))
    made = [Call("clone.default", (Ref(number),), {}, (number + 10,)) for number in range(1, 5)]
    known = [11, 12, 13, 14]
    for out in range(20, 20 + calls):
        kind = rng.random()
        if kind < 0.35:
            made.append(Call(rng.choice(UNARY), (Ref(rng.choice(known)),), {}, (out,)))
            known.append(out)
        elif kind < 0.7:
            made.append(Call(rng.choice(BINARY), (Ref(rng.choice(known)), Ref(rng.choice(known))), {}, (out,)))
            known.append(out)
        elif kind < 0.9:
            made.append(Call(rng.choice(WRITES), (Ref(rng.choice(known)), Ref(rng.choice(known))), {}, ()))
        else:
            made.append(Call("select.int", (Ref(rng.choice(known[:4])), 0, rng.randrange(4)), {}, (out,)))
            made.append(Call("expand.default", (Ref(out), Items((4, 4))), {}, (out + 100,)))
            made.append(Call("clone.default", (Ref(out + 100),), {}, (out + 200,)))
            known.append(out + 200)
    outputs = tuple((f"o{ref}", ref) for ref in known)
    return Program(inputs, tuple(made), outputs), {"s0": HEART, "s1": LABS}


def run(program: Program, secrets: torch.Tensor) -> tuple[WorkerSession, Reply]:
    worker = Worker("clinic", gate=OpenGate())
    worker.catalogue.register("heart", {"x": secrets})
    worker.catalogue.register("labs", {"x": secrets.flip(0).clone()})
    door = worker.open("mallory")
    door.handle(Frame(1, (Load("heart", (3,)), Load("labs", (4,)))))
    door.handle(Frame(2, (Put(1, share(torch.ones(4, 4))), Put(2, share(torch.full((4, 4), 2.0))))))
    return door, door.handle(Frame(3, program.calls))


@FIXED
@given(st.integers(0, 10**6))
def test_the_stores_labels_are_those_that_flow_finds(seed: int) -> None:
    program, labels = programs(seed)
    found = flow(program, labels)
    door, _ = run(program, torch.arange(16.0).view(4, 4))  # a write to what overlaps itself may fail, by its type
    for name, ref in program.outputs:
        assert set(door.store.label(ref).sources) <= set(found[name].sources), name
    aliases = {"t.default", "squeeze.default", "select.int", "expand.default"}
    if not any(call.op in aliases for call in program.calls):
        assert {name: door.store.label(ref) for name, ref in program.outputs} == found


def transcript(door: WorkerSession, program: Program, reply: Reply) -> Iterator[bytes]:
    """Everything that the caller can see, as bytes."""
    refs = tuple(ref for _, ref in program.outputs)
    for answer in (reply, door.handle(Frame(4, (Describe(refs),))), door.handle(Frame(5, (Fetch(refs),)))):
        yield from packed(answer).packets(0)


@FIXED
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_two_runs_that_differ_in_private_values_only_look_alike(seed: int, secret: int) -> None:
    program, _ = programs(seed)
    generator = torch.Generator().manual_seed(secret)
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e38])
    secrets = [torch.randn(4, 4, generator=generator), special.expand(4, 4).clone()]
    seen = []
    for values in secrets:
        door, reply = run(program, values)
        seen.append(b"".join(transcript(door, program, reply)))
    assert seen[0] == seen[1]


def test_the_transcript_would_show_a_difference() -> None:
    """The test above can fail: with a gate that lets values out, the two runs differ."""

    class Allowing(OpenGate):
        def release(self, who: Any, question: Any, what: str = "", *, spends: bool = True) -> None:
            pass

    program, _ = programs(1)
    seen = []
    for values in (torch.zeros(4, 4), torch.ones(4, 4)):
        door, reply = run(program, values)
        door.worker.gate = Allowing()  # type: ignore[assignment]
        seen.append(b"".join(transcript(door, program, reply)))
    assert seen[0] != seen[1]


def test_every_operator_kind_of_failure_is_hidden() -> None:
    """Each fails on one secret and not on the other."""
    cases = [
        ("linalg_cholesky_ex.default", torch.eye(3), -torch.eye(3), (), (10, 11)),
        ("linalg_inv_ex.default", torch.eye(3), torch.zeros(3, 3), (), (10, 11)),
        ("gather.default", torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 7), (1, Ref(1)), (10,)),
    ]
    for op, good, bad, rest, outs in cases:
        seen = []
        for secret in (good, bad):
            door = session(heart=secret)
            door.handle(Frame(2, (Put(5, share(torch.ones(2, 2))),)))
            first = Ref(5) if rest else Ref(1)
            named = {"check_errors": True} if len(outs) > 1 else {}
            reply = done(door, Call(op, (first, *rest), named, outs))
            seen.append(msgspec.msgpack.encode([reply, door.handle(Frame(3, (Describe((10,)),)))]))
            assert 10 in door.store, op
        assert seen[0] == seen[1], op


# -- what a session could measure ---------------------------------------------------------------------------


def measured(door: WorkerSession) -> Any:
    """What a session can find out of its slots: their types, whose storage each has, and what it is charged."""
    cells = door.store.cells
    owners = [next(ref for ref in cells if cells[ref] is cell) for cell in cells.values()]
    described = door.handle(Frame(50, (Describe(tuple(door.store)),)))
    return described, owners, [cell.nbytes for cell in cells.values()], door.store.held


ONES = torch.ones(6, 4)
UNEVEN: dict[str, tuple[Call, torch.Tensor, torch.Tensor]] = {
    "a loss that goes through more than its result": (
        Call("binary_cross_entropy.default", (Ref(1), Ref(5)), {}, (10,)), ONES, ONES * -1,
    ),
    "factors in another order": (
        Call("_linalg_svd.default", (Ref(1), False, True), {}, (10, 11, 12)), ONES, ONES * float("nan"),
    ),
    "a write that fails on its way": (
        Call("index_fill_.int_Scalar", (Ref(5), 0, Ref(1), 0.5), {}, ()), torch.tensor([0, 1]), torch.tensor([0, 99]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("in_a_program", [False, True])
@pytest.mark.parametrize("case", UNEVEN)
def test_a_private_result_is_in_memory_as_was_forecast(case: str, in_a_program: bool) -> None:
    call, good, bad = UNEVEN[case]
    seen = []
    for secret in (good, bad):
        door = session(heart=secret)
        door.handle(Frame(2, (Put(5, share(torch.ones(6, 4))),)))
        messages: list[Any] = [call]
        if in_a_program:
            inputs = (Input("x", 1, type_of(secret)), Input("mine", 5, type_of(ONES), updates=not call.outs))
            outputs = tuple((f"o{out}", out) for out in call.outs)
            program = Program(inputs, (call,), outputs)
            again = [Run(program.digest, (1, 5), tuple(out + n for out in call.outs), ()) for n in (0, 100, 200)]
            messages = [Define(program), *again]
        assert door.handle(Frame(3, tuple(messages))).failures == ()
        assert {str(door.store.label(ref)) for ref in (*call.outs, *(() if call.outs else (5,)))} == {"heart"}
        assert any(cell.failed for cell in door.store.cells.values()) == (secret is bad)
        seen.append(measured(door))
    assert seen[0] == seen[1]


def test_what_the_generator_went_through_stays_known_after_a_clear() -> None:
    door = session(heart=torch.ones(4))
    done(door, Call("poisson.default", (Ref(1),), {}, (10,)), Clear())
    done(door, Call("rand.default", (Items((3,)),), {}, (11,)))
    assert door.store.label(11) == HEART
    (answer,) = done(door, Fetch((11,))).results
    assert answer.arrays[0].reason.endswith("heart stays")


def test_an_id_that_is_given_anew_is_another_name_in_what_the_owner_reads() -> None:
    door = session(heart=X)
    done(
        door,
        Put(5, share(torch.zeros(3, 4))),
        Call("mul.Tensor", (Ref(1), Ref(5)), {}, (10,)),
        Drop((5,)),
        Call("mean.default", (Ref(1),), {}, (5,)),
        Call("add.Tensor", (Ref(10), Ref(5)), {}, (11,)),
    )
    assert door.meter is not None
    program = door.meter.history.program((11,), door.store)
    check(program)
    assert [item.name for item in program.inputs] == ["heart.x", "brought0"]
    assert "mul.Tensor(heart.x, brought0)" in str(program)


# -- what schemas do not say ----------------------------------------------------------------------------------


MATRIX = type_of(ONES)


def ran(program: Program, times: int, numbers: tuple[float, ...] = ()) -> WorkerSession:
    """A session that has run a program of two matrices, the private one first, so often; outputs at 100, 200, ..."""
    door = session(heart=torch.arange(24.0).view(6, 4) + 7000)
    door.handle(Frame(2, (Put(5, share(torch.ones(6, 4))),)))
    outs = [tuple(100 * n + at for at in range(len(program.outputs))) for n in range(1, times + 1)]
    runs = [Run(program.digest, (1, 5), out, numbers) for out in outs]
    assert door.handle(Frame(3, (Define(program), *runs))).failures == ()
    return door


@pytest.mark.parametrize(
    ("view", "at"),
    [
        (Call("_unsafe_view.default", (Ref(3), Items((6, 4))), {}, (4,)), (0, 1)),
        (Call("conj_physical.default", (Ref(3),), {}, (4,)), (0, 1)),
        (Call("unsafe_split.Tensor", (Ref(3), 6), {}, (4,)), (0, 1)),
    ],
)
def test_nothing_private_is_written_over_memory_that_a_view_gives_out(view: Call, at: tuple[int, int]) -> None:
    calls = (
        Call("mul.Tensor", (Ref(2), 1.0), {}, (3,)),
        view,
        Call("threshold_backward.default", (Ref(3), Ref(1), Ref(9)), {}, (5,)),
    )
    program = Program((Input("a", 1, MATRIX), Input("b", 2, MATRIX)), calls, (("v", 4),), (("t", 9),))
    door = ran(program, 3, (7010.0,))
    for out in (100, 200, 300):
        assert not door.store.label(out)
        assert bool((door.store[out] == 1).all())


@pytest.mark.parametrize("op", ["_unsafe_view.default", "unsafe_split.Tensor"])
def test_a_write_to_a_hidden_view_of_an_input_is_an_update(op: str) -> None:
    args = (Ref(2), Items((6, 4))) if op == "_unsafe_view.default" else (Ref(2), 6)
    calls = (Call(op, args, {}, (5,)), Call("add_.Tensor", (Ref(5), Ref(1)), {}, ()))
    inputs = (Input("a", 1, MATRIX), Input("b", 2, MATRIX))
    with pytest.raises(ProgramError, match="or a view of one, and would be written"):
        check(Program(inputs, calls, ()))
    updating = Program((inputs[0], msgspec.structs.replace(inputs[1], updates=True)), calls, ())
    assert flow(updating, {"a": HEART})["b"] == HEART


def test_what_is_drawn_after_a_private_draw_is_private_and_its_program_says_why() -> None:
    calls = (Call("poisson.default", (Ref(1),), {}, (5,)), Call("rand_like.default", (Ref(2),), {}, (6,)))
    program = Program((Input("a", 1, MATRIX), Input("b", 2, MATRIX)), calls, (("noise", 6),))
    assert flow(program, {"a": HEART})["noise"] == HEART
    door = ran(program, 3)
    assert door.meter is not None
    for out in (100, 200, 300):
        assert "poisson.default(heart.x)" in str(door.meter.history.program((out,), door.store))
    done(door, Seed(share(torch.Generator().get_state())), Call("rand_like.default", (Ref(5),), {}, (400,)))
    assert not door.store.label(400)


def test_what_a_run_gives_out_without_a_call_has_its_story() -> None:
    calls = (Call("mul.Tensor", (Ref(1), 2.0), {}, (3,)),)
    inputs = (Input("a", 1, MATRIX), Input("b", 2, MATRIX))
    door = ran(Program(inputs, calls, (("same", 1), ("one", 3), ("again", 3))), 3)
    assert door.meter is not None
    for first in (100, 200, 300):
        same, again = (str(door.meter.history.program((first + at,), door.store)) for at in (0, 2))
        assert "view.default(heart.x, [6, 4])" in same
        assert "mul.Tensor(heart.x, 2.0)" in again
        assert "brought" not in same + again


def test_a_device_is_no_text_for_an_owner_to_read() -> None:
    lie = msgspec.structs.replace(MATRIX, device="cpu\n\nwhat a run makes\n  mean: float32[4]")
    with pytest.raises(ProgramError, match="is no device; write 'cpu'"):
        check(Program((Input("a", 1, lie),), (), (("o", 1),)))
