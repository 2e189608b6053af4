"""Attacks of who may run programs on the data, those that its owner has read, and may touch it in no other way."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import msgspec
import torch
from at_once import at_once
from hostile import SECRET, Attack, World, attack, call, named

from housecall.owner.policy import Plans, Policy, Release, Use
from housecall.owner.signing import OwnerKey
from housecall.program.call import Call, Input, Items, Program
from housecall.transport.arrays import share
from housecall.types import Ref, TensorType
from housecall.wire.messages import Define, Drop, Frame, Load, Put, Run, Seed, Status, Submit
from housecall.worker.worker import WorkerSession

X, MINE = Ref(1), Ref(5)
USE = Use(plans=("mallory", "eve"))
READ = Policy(use=USE, plans=Plans(ask=True), release=Release(approvals=True))
MATRIX = TensorType("float32", (6, 4), (4, 1))


def program(*calls: Call, inputs: tuple[Input, ...] = (Input("a", 1, MATRIX),), out: int = 10) -> Program:
    return Program(inputs, calls, (("out", out),))


SUM = program(call("sum.default", X))
TWICE = program(call("mul.Tensor", X, 2.0))
FIRST = program(call("slice.Tensor", X, 0, 0, 1))


def programs_only(*guards: str) -> Callable[[Attack], Attack]:
    """`attack`, where only programs may read the data: %1 is `heart.x`, and `lungs` has `x` and `z` of its type."""

    def listed(function: Attack) -> Attack:
        def begun(_: World) -> Any:
            world = World(policy=READ)
            world.worker.catalogue.register("lungs", {"x": -world.secret, "z": world.secret})
            world.owner.policies.register("lungs", READ)
            return function(world)

        begun.__name__ = function.__name__
        attack(*guards)(begun)
        return function

    return listed


def approved(world: World, made: Program, *ids: int, **options: Any) -> str:
    (said,) = world.done(Define(made), Submit(made.digest, ids or (1,), "for science")).results
    world.owner.approve(said.request, **options)
    return said.request


def ran(world: World, made: Program, *ids: int, out: int = 20, door: WorkerSession | None = None) -> Any:
    """What a run gives, if it is done at all."""
    door = door or world.door
    world.frame(Define(made), Run(made.digest, ids or (1,), (out,)), door=door)
    door.halt.cause = None
    return door.store.tensors().get(out)


def left(world: World, made: Program, *ids: int) -> Any:
    """What of a run comes out."""
    ran(world, made, *ids)
    return world.taken(20)


@attack("made by a program")
def attack_takes_a_column_where_what_programs_make_may_leave(_: World) -> Any:
    """An exact release is of what accepted programs give, to who may do nothing else."""
    plans, release = Plans(digests=("*",)), Release(exact=("mallory",))
    world = World(policy=Policy(use=Use(plans=("mallory",)), plans=plans, release=release))
    assert left(world, SUM) is not None
    return world.taken(1)


# -- without asking ---------------------------------------------------------------------------------------------


def _done(*calls: Call) -> Attack:
    """Whether a call was done on data that only programs may read."""

    def attack(_: World) -> Any:
        world = World(policy=READ)
        world.put(5, torch.zeros(6, 4))
        world.frame(*calls)
        changed = world.door.store.tensors()[5]
        return world.door.store.tensors().get(10) if not changed.any() else changed

    return attack


CALLS: dict[str, tuple[Call, ...]] = {
    "clone": (call("clone.default", X),),
    "a view": (call("t.default", X),),
    "a sum": (call("sum.default", X),),
    "a list": (call("cat.default", Items((X, X))),),
    "a write into hers": (Call("copy_.default", (MINE, X), {}, ()),),
    "an out argument": (Call("add.out", (X, X), {"out": MINE}, ()),),
    "an index": (call("select.int", X, 0, 0),),
}
for _name, _calls in CALLS.items():
    named(f"pointers_for_programs_only_{_name.replace(' ', '_')}", _done(*_calls), "closed")


@programs_only("accepted")
def attack_runs_what_nobody_has_read(world: World) -> Any:
    return ran(world, SUM)


@programs_only("accepted")
def attack_runs_before_the_answer(world: World) -> Any:
    world.done(Define(SUM), Submit(SUM.digest, (1,), "soon?"))
    return ran(world, SUM)


@programs_only("accepted")
def attack_runs_what_was_denied(world: World) -> Any:
    (said,) = world.done(Define(SUM), Submit(SUM.digest, (1,), "please")).results
    world.owner.deny(said.request, "no")
    return ran(world, SUM)


@programs_only("accepted")
def attack_runs_after_asking_was_withdrawn(world: World) -> Any:
    approved(world, SUM)
    world.owner.policies.register("heart", Policy(use=USE, release=Release(approvals=True)))
    return ran(world, SUM)


@programs_only("closed")
def attack_pointers_on_what_an_approved_run_made(world: World) -> Any:
    approved(world, TWICE)
    assert ran(world, TWICE) is not None
    world.frame(call("sum.default", Ref(20)))
    return world.door.store.tensors().get(10)


@programs_only("accepted")
def attack_a_program_of_one_call_for_the_call(world: World) -> Any:
    """As a client's traces do it: calls that repeat leave as a run."""
    return ran(world, program(call("clone.default", X)))


# -- with an approval of something else -------------------------------------------------------------------------


@programs_only("sources")
def attack_points_it_at_another_column(world: World) -> Any:
    world.done(Load("lungs", (3, 4)))
    approved(world, SUM, 3, release=True)
    return left(world, SUM, 4)


@programs_only("accepted")
def attack_points_it_at_another_data_set(world: World) -> Any:
    world.done(Load("lungs", (3, 4)))
    approved(world, SUM, 3)
    return ran(world, SUM, 1)


@programs_only("sources")
def attack_points_it_at_what_another_program_made(world: World) -> Any:
    approved(world, FIRST)
    world.done(Put(6, share(torch.zeros(1, 4))))
    ran(world, FIRST, out=21)
    both = program(
        call("add.Tensor", X, Ref(2)),
        inputs=(Input("a", 1, MATRIX), Input("b", 2, TensorType("float32", (1, 4), (4, 1)))),
    )
    approved(world, both, 1, 6, release=True)
    return left(world, both, 1, 21)


@programs_only("types")
def attack_brings_one_row_where_six_were_read(world: World) -> Any:
    rows = Input("rows", 2, TensorType("int64", (6,), (1,)))
    mean = program(
        call("index_select.default", X, 0, Ref(2), outs=(9,)),
        call("mean.default", Ref(9)),
        inputs=(Input("a", 1, MATRIX), rows),
    )
    world.done(Put(5, share(torch.arange(6))), Put(6, share(torch.tensor([3]))))
    approved(world, mean, 1, 5, release=True)
    return left(world, mean, 1, 6)


@programs_only("apart")
def attack_gives_one_tensor_for_two(world: World) -> Any:
    """Read: what is taken is times a mask, and the mask is what she brought. It is overwritten before."""
    masked = program(
        Call("add_.Tensor", (Ref(2), X), {}, ()),
        call("mul.Tensor", X, Ref(3)),
        inputs=(Input("a", 1, MATRIX), Input("sum", 2, MATRIX, updates=True), Input("mask", 3, MATRIX)),
    )
    world.done(Put(5, share(torch.zeros(6, 4))), Put(6, share(torch.zeros(6, 4))))
    approved(world, masked, 1, 5, 6, release=True)
    return left(world, masked, 1, 5, 5)


@programs_only("columns by binding")
def attack_binds_another_value_under_a_columns_id(world: World) -> Any:
    approved(world, TWICE)
    approved(world, SUM, uses=2, release=True)
    world.done(Load("heart", (3, 4)), Run(SUM.digest, (1,), (19,)), Drop((1,)), Run(TWICE.digest, (3,), (1,)))
    return left(world, SUM, 1)


@programs_only("text that was read")
def attack_shows_the_owner_another_text(world: World) -> Any:
    """Whoever can write the worker's folder edits the request before she reads it."""
    (said,) = world.done(Define(TWICE), Submit(TWICE.digest, (1,), "harmless")).results
    shelf, name = world.owner.requests._shelf, f"requests/{said.request}.json"
    shelf.write(name, shelf.read(name).replace(b"mul.Tensor(heart.x, 2.0)", b"mul.Tensor(heart.x, 0.0)"))
    world.owner.approve(said.request, release=True)
    return left(world, TWICE)


@programs_only("names")
def attack_names_that_pass_for_a_program(world: World) -> Any:
    """The owner is to read that zeros come of it, and nothing after that."""
    name = "a: float32[6, 4]) {\n  %1 = mul.Scalar(a, 0.0)\n  return out=%1\n}" + "\n" * 60
    lying = program(call("mul.Tensor", Ref(2), 2.0), inputs=(Input(name, 2, MATRIX), Input("b", 1, MATRIX)))
    world.done(Define(lying), Put(5, share(torch.zeros(6, 4))))
    reply = world.frame(Submit(lying.digest, (5, 1), "harmless"))
    return reply.results or None


@programs_only("genuine")
def attack_signs_her_own_approval(world: World) -> Any:
    (said,) = world.done(Define(TWICE), Submit(TWICE.digest, (1,), "harmless")).results
    made = world.owner.requests.approve(said.request, world.owner._key)
    forged = msgspec.structs.replace(made, uses=1000, release=True).signed(OwnerKey.generate())
    world.owner.requests._shelf.write(f"approvals/{said.request}.json", msgspec.json.encode(forged))
    return left(world, TWICE)


@programs_only("genuine")
def attack_adds_that_it_may_leave(world: World) -> Any:
    request = approved(world, TWICE)
    shelf, name = world.owner.requests._shelf, f"approvals/{request}.json"
    shelf.write(name, shelf.read(name).replace(b'"release":false', b'"release":true'))
    return left(world, TWICE)


@programs_only("expiry")
def attack_runs_after_the_end(world: World) -> Any:
    approved(world, SUM)
    world.worker.gate._now = lambda: datetime.now(UTC) + timedelta(days=2)
    return ran(world, SUM)


@programs_only("uses")
def attack_runs_once_more(world: World) -> Any:
    approved(world, SUM)
    assert ran(world, SUM) is not None
    return ran(world, SUM, out=21)


@programs_only("uses")
def attack_runs_in_parallel_on_one_use(world: World) -> Any:
    approved(world, SUM)
    doors = [world.opened("mallory") for _ in range(6)]
    out = []

    def run(number: int, door: WorkerSession) -> None:
        door.handle(Frame(100 + number, (Define(SUM), Run(SUM.digest, (1,), (20,)))))
        out.extend([door] if 20 in door.store.tensors() else [])

    at_once(*[partial(run, *item) for item in enumerate(doors)])
    assert out
    return None if len(out) == 1 else out


@programs_only("approval's principal")
def attack_runs_what_another_was_approved(world: World) -> Any:
    approved(world, SUM)
    return ran(world, SUM, door=world.opened("eve"))


@programs_only("request's principal")
def attack_reads_anothers_submission(world: World) -> Any:
    (said,) = world.done(Define(SUM), Submit(SUM.digest, (1,), "mine")).results
    return world.frame(Status(said.request), door=world.opened("eve")).results or None


# -- what may leave ---------------------------------------------------------------------------------------------


@programs_only("door")
def attack_takes_what_a_run_made(world: World) -> Any:
    approved(world, TWICE)
    return left(world, TWICE)


@programs_only("chain")
def attack_goes_on_from_runs_that_were_to_stay(world: World) -> Any:
    """Many silent runs gather records; one that may release brings all home."""
    gather = program(call("add.Tensor", X, Ref(2)), inputs=(Input("a", 1, MATRIX), Input("so_far", 2, MATRIX)))
    world.put(5, torch.zeros(6, 4))
    approved(world, gather, 1, 5)
    assert ran(world, gather, 1, 5, out=21) is not None
    approved(world, gather, 1, 5, release=True)
    return left(world, gather, 1, 21)


@programs_only("of slots")
def attack_a_view_that_may_leave_takes_the_rest_along(world: World) -> Any:
    approved(world, TWICE)
    assert ran(world, TWICE, out=21) is not None
    approved(world, FIRST, 21, release=True)
    assert ran(world, FIRST, 21, out=22) is not None
    return world.taken(21)


@programs_only("still good")
def attack_takes_after_the_approval_was_withdrawn(world: World) -> Any:
    request = approved(world, TWICE, release=True)
    assert ran(world, TWICE) is not None
    world.owner.deny(request, "a mistake")
    return world.taken(20)


@programs_only("still good")
def attack_takes_after_the_approval_has_ended(world: World) -> Any:
    approved(world, TWICE, release=True)
    assert ran(world, TWICE) is not None
    world.worker.gate._now = lambda: datetime.now(UTC) + timedelta(days=2)
    return world.taken(20)


@programs_only("which value")
def attack_runs_on_another_output_than_was_read(world: World) -> Any:
    both = Program(
        (Input("a", 1, MATRIX),),
        (call("mul.Tensor", X, 0.0, outs=(10,)), call("mul.Tensor", X, 1.0, outs=(11,))),
        (("nothing", 10), ("raw", 11)),
    )
    approved(world, both)
    world.frame(Define(both), Run(both.digest, (1,), (21, 22)))
    approved(world, TWICE, 21, release=True)
    return left(world, TWICE, 22)


@programs_only("behind")
def attack_takes_through_another_program_what_was_withdrawn(world: World) -> Any:
    request = approved(world, TWICE)
    assert ran(world, TWICE, out=21) is not None
    approved(world, FIRST, 21, release=True)
    world.owner.deny(request, "a mistake")
    return left(world, FIRST, 21)


@programs_only("seeded")
def attack_reads_what_another_program_drew_off_the_generator(world: World) -> Any:
    """How much `poisson` draws depends on the elements: what is drawn next tells of them."""
    counts = program(call("poisson.default", X))
    noise = program(call("rand_like.default", Ref(2)), inputs=(Input("b", 2, MATRIX),))
    approved(world, counts)
    world.put(5, torch.zeros(6, 4))
    state = torch.Generator().manual_seed(1)
    world.frame(Seed(share(state.get_state())))
    assert ran(world, counts, out=21) is not None
    world.frame(Define(noise), Submit(noise.digest, (5,), "noise"))
    for request in world.owner.pending():
        world.owner.approve(request.id, release=True)
    drawn = left(world, noise, 5)
    return None if drawn is None or torch.equal(drawn, torch.rand(6, 4, generator=state)) else drawn


@programs_only("renewed")
def attack_works_on_with_pointers_that_were_withdrawn(world: World) -> Any:
    world.owner.policies.register("lungs", Policy.open_to("mallory"))
    world.done(Load("lungs", (30, 31)))
    world.owner.policies.register("lungs", Policy(use=Use(plans=("mallory",)), release=Release(exact=("mallory",))))
    world.frame(call("neg.default", Ref(30), outs=(32,)))
    return world.taken(32)


@programs_only("ledger")
def attack_runs_where_the_ledger_is_full(world: World) -> Any:
    approved(world, SUM)

    class Full:
        def append(self, entry: Any) -> Any:
            raise OSError("no space left on device")

    world.worker.gate.ledger = Full()  # type: ignore[assignment]
    return ran(world, SUM)


# -- what refusals tell -----------------------------------------------------------------------------------------


def _told(*guards: str) -> Callable[[Any], Any]:
    """Attacks that compare what two worlds tell which differ in private elements alone."""

    def listed(function: Any) -> Any:
        def compared(_: World) -> Any:
            worlds = World(SECRET, policy=READ), World(torch.zeros(6, 4), policy=READ)
            return function(worlds)

        named(function.__name__.removeprefix("attack_"), compared, *guards)
        return function

    return listed


@_told("closed, and hidden failures")
def attack_a_refusal_that_depends_on_elements(worlds: tuple[World, World]) -> Any:
    """Of a call that would fail on one of the two: it is refused by its label, before it runs."""
    failing = call("linalg_cholesky_ex.default", X, outs=(10, 11), check_errors=True)
    square = call("slice.Tensor", X, 0, 0, 4, outs=(9,))
    return worlds[0].told(worlds, square, msgspec.structs.replace(failing, args=(Ref(9),)))


@_told("hidden failures")
def attack_an_approved_run_that_fails(worlds: tuple[World, World]) -> Any:
    inverse = program(
        call("slice.Tensor", X, 0, 0, 4, outs=(9,)),
        call("add.Tensor", Ref(9), Ref(2), outs=(8,)),
        call("linalg_cholesky_ex.default", Ref(8), outs=(10, 11), check_errors=True),
        inputs=(Input("a", 1, MATRIX), Input("eye", 2, TensorType("float32", (4, 4), (4, 1)))),
    )
    for world in worlds:
        world.put(5, torch.eye(4))
        approved(world, inverse, 1, 5)
    return worlds[0].told(worlds, Run(inverse.digest, (1, 5), (20,)))
