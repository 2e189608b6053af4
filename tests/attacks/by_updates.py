"""Attacks on updates and mean scores: past a stage, past the budget, past "one record at a time", past who accepts."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import torch
from hostile import SECRET, World, attack, call

from housecall.owner.policy import Budget, Metrics, Plans, Policy, Release, Use
from housecall.privacy.clip import Clip
from housecall.privacy.noise import Noise
from housecall.program.call import Call, Input, Items, Program
from housecall.transport.arrays import share
from housecall.types import Ref, TensorType
from housecall.wire.messages import Define, Evaluate, Frame, Load, Put, Seed, Update
from housecall.worker.limits import Limits
from housecall.worker.worker import Worker

X, Y = Ref(1), Ref(2)
ROW = TensorType("float32", (1, 4), (4, 1))
ONE = TensorType("float32", (1,), (1,))
NOISED = Policy(
    use=Use(interactive=("mallory",), plans=("mallory",)),
    release=Release(update=(Clip(norm=1.0), Noise(multiplier=8.0)), metrics=Metrics(minimum=6, noise=4.0)),
    budget=Budget(epsilon=1.5, delta=1e-6),
)
PLAIN = Policy(use=Use(plans=("mallory",)), plans=Plans(ask=True), release=Release(metrics=Metrics(minimum=6)))
CLIPPED = Policy(use=Use(interactive=("mallory",)), release=Release(update=(Clip(norm=1.0),)))


def _world(policy: Policy = NOISED) -> World:
    return World(policy=policy)


def _update(world: World, ids: tuple[int, ...] = (1,), since: tuple[int, ...] = (50,)) -> Any:
    """What leaves of an update: its first values, or `None`."""
    world.frame(Put(50, share(torch.zeros(6, 4))))
    reply = world.frame(Update(ids, since))
    world.door.halt.cause = None
    return reply.results[0].arrays[0].data if reply.results else None  # type: ignore[union-attr]


def _scored(*calls: Call, inputs: tuple[Input, ...] = (Input("x", 1, ROW),), out: int = 10) -> Program:
    return Program(inputs, calls, (("out", out),))


SUM = _scored(call("sum.default", X))


def _score(
    world: World, program: Program = SUM, *inputs: Any, bounds: tuple[float, float] = (0.0, 1e5), name: str = "heart"
) -> float | None:
    """A mean score; `None` if it is refused."""
    reply = world.frame(Define(program), Evaluate(name, program.digest, inputs or ("x",), bounds))
    world.door.halt.cause = None
    return reply.results[0].values[0] if reply.results else None  # type: ignore[union-attr]


# -- updates ----------------------------------------------------------------------------------------------------


@attack("noised update")
def attack_takes_the_records_as_an_update(_: World) -> Any:
    """With eight times the norm of noise in each value, nothing of 24 of them is to be seen."""
    found = _update(_world())
    error = (found / found.norm() - SECRET / SECRET.norm()).norm()
    return found if error < 0.01 else None


@attack("clipped")
def attack_makes_an_update_so_long_that_noise_does_not_show(_: World) -> Any:
    world = _world()
    world.done(call("mul.Tensor", X, 1e9, outs=(10,)))
    found = _update(world, (10,))
    return found if torch.allclose(found / 1e9, SECRET, rtol=0.01) else None


@attack("clipped")
def attack_hides_records_beside_what_is_no_number(_: World) -> Any:
    """NaN in one place, and no norm is greater than the bound: NaN is not."""
    world = _world()
    world.put(13, torch.tensor([[math.nan, 0.0, 0.0, 0.0]]))
    world.done(call("mul.Tensor", X, 1e9, outs=(11,)), call("add.Tensor", Ref(11), Ref(13), outs=(12,)))
    found = _update(world, (12,))
    return found if torch.allclose(found[:, 1:] / 1e9, SECRET[:, 1:], rtol=0.01) else None


@attack("spent")
def attack_averages_updates(_: World) -> Any:
    world = _world()
    answers = [_update(world) for _ in range(4)]
    assert answers[0] is not None
    return answers[3]


@attack("spent")
def attack_asks_for_an_update_after_scores_have_spent_the_budget(_: World) -> Any:
    world = _world()
    assert None not in [_score(world) for _ in range(3)]
    return _update(world)


@attack("since is public")
def attack_gives_another_value_as_what_it_was_before(_: World) -> Any:
    """What is clipped is then chosen by private values."""
    world = _world(CLIPPED)
    world.done(call("mul.Tensor", X, 1.0, outs=(10,)), call("mul.Tensor", X, 1.00001, outs=(11,)))
    return _update(world, (11,), (10,))


@attack("policy")
def attack_asks_for_an_update_where_none_may_leave(world: World) -> Any:
    return _update(world)


@attack("policy")
def attack_asks_for_an_update_of_two_owners_of_which_one_forbids_it(_: World) -> Any:
    world = _world()
    world.worker.catalogue.register("labs", {"z": torch.ones(6, 4)})
    world.owner.policies.register("labs", Policy(use=Use(interactive=("mallory",))))
    world.done(Load("labs", (7,)), call("add.Tensor", X, Ref(7), outs=(10,)))
    return _update(world, (10,))


@attack("policy")
def attack_chooses_the_looser_of_two_pipelines(_: World) -> Any:
    world = _world()
    world.worker.catalogue.register("labs", {"z": torch.ones(6, 4)})
    loose = Release(update=(Clip(norm=1e9), Clip(norm=1e9), Clip(norm=1e9)))
    world.owner.policies.register("labs", Policy(use=Use(interactive=("mallory",)), release=loose))
    world.done(Load("labs", (7,)), call("add.Tensor", X, Ref(7), outs=(10,)))
    return _update(world, (10,))


@attack("paid")
def attack_takes_an_update_while_the_ledger_cannot_be_written(_: World) -> Any:
    world = _world()
    world.owner.ledger.close()
    return _update(world)


@attack("replaced")
def attack_takes_an_update_of_data_that_was_replaced_by_something_harmless(_: World) -> Any:
    world = _world()
    world.worker.catalogue.register("heart", {"x": torch.zeros(6, 4), "y": torch.zeros(6).long()}, replace=True)
    world.owner.policies.register("heart", NOISED)
    return _update(world)


@attack("limits")
def attack_fills_the_memory_with_an_update_of_an_expanded_number(_: World) -> Any:
    """Whether it was begun: its difference alone would take 16 MB."""
    world = _world()
    world.worker = Worker(
        "clinic", Limits(session_bytes=10_000_000), catalogue=world.worker.catalogue, gate=world.worker.gate
    )
    world.door = world.opened("mallory")
    many = Items((1_000, 2_000))
    world.put(20, torch.zeros(1))
    made = call("sum.default", X, outs=(10,)), call("expand.default", Ref(10), many, outs=(11,))
    world.done(*made, call("expand.default", Ref(20), many, outs=(21,)))
    return _update(world, (11,), (21,))


# -- scores -----------------------------------------------------------------------------------------------------


@attack("noise")
def attack_reads_the_mean_off_a_score(_: World) -> Any:
    """Of six records the noise of a mean is most of its bounds."""
    found = _score(_world(), bounds=(0.0, 1e5))
    assert found is not None
    return found if abs(found - float(SECRET.sum(1).mean())) < 1 else None


@attack("clamped")
def attack_scores_far_beyond_the_bounds(_: World) -> Any:
    found = _score(
        _world(), _scored(call("sum.default", X, outs=(9,)), call("mul.Tensor", Ref(9), 1e6)), bounds=(0.0, 1.0)
    )
    assert found is not None
    return found if found > 1e6 else None


@attack("spent")
def attack_averages_scores(_: World) -> Any:
    world = _world()
    answers = [_score(world) for _ in range(6)]
    assert answers[0] is not None
    return answers[5]


@attack("public in a score")
def attack_tells_all_records_of_one(_: World) -> Any:
    """With the first record as a weight each score tells of it, and their mean has the noise of a sixth."""
    world = _world()
    world.done(call("slice.Tensor", X, 0, 0, 1, outs=(10,)))
    program = _scored(call("sum.default", Ref(2)), inputs=(Input("x", 1, ROW), Input("w", 2, ROW)))
    return _score(world, program, "x", 10)


@attack("a score that writes")
def attack_keeps_something_from_record_to_record(_: World) -> Any:
    """A weight that each record is added to."""
    world = _world()
    world.put(20, torch.zeros(1, 4))
    adds = Call("add_.Tensor", (Ref(2), X), {}, ())
    inputs = Input("x", 1, ROW), Input("w", 2, ROW, updates=True)
    program = Program(inputs, (adds, call("sum.default", Ref(2))), (("out", 10),))
    return _score(world, program, "x", 20)


@attack("a score")
def attack_draws_more_numbers_for_some_records(_: World) -> Any:
    """How many were drawn would be seen by the next record's score."""
    world = _world()
    world.done(Seed(share(torch.get_rng_state())))
    return _score(world, _scored(call("rand_like.default", X, outs=(9,)), call("sum.default", Ref(9))))


@attack("policy")
def attack_scores_fewer_records_than_the_owner_said(_: World) -> Any:
    world = _world(Policy(use=NOISED.use, release=Release(metrics=Metrics(minimum=7, noise=4.0)), budget=NOISED.budget))
    return _score(world)


@attack("policy")
def attack_scores_without_noise_by_a_program_that_nobody_has_read(_: World) -> Any:
    return _score(_world(PLAIN))


def _accepted(world: World, program: Program = SUM, bounds: tuple[float, float] = (0.0, 1e5), **options: Any) -> None:
    message = Evaluate("heart", program.digest, ("x",), bounds, "for science", 1)
    (said,) = world.done(Define(program), message).results
    world.owner.approve(said.request, **options)  # type: ignore[union-attr]  # it is a `Requested`


@attack("uses")
def attack_uses_an_approved_score_twice(_: World) -> Any:
    world = _world(PLAIN)
    _accepted(world)
    assert _score(world) is not None
    return _score(world)


@attack("score's bounds")
def attack_has_an_approved_score_clamped_elsewhere(_: World) -> Any:
    """Between bounds that only one record is within."""
    world = _world(PLAIN)
    _accepted(world)
    low, high = sorted(SECRET.sum(1).tolist())[:2]
    return _score(world, bounds=(low, high))


@attack("score's column")
def attack_scores_another_column_than_was_read(_: World) -> Any:
    world = _world(PLAIN)
    world.worker.catalogue.register("lungs", {"x": SECRET.clone(), "z": -SECRET})
    world.owner.policies.register("lungs", PLAIN)
    message = Evaluate("lungs", SUM.digest, ("x",), (-1e5, 1e5), "for science", 1)
    (said,) = world.done(Define(SUM), message).results
    world.owner.approve(said.request)  # type: ignore[union-attr]  # it is a `Requested`
    return _score(world, SUM, "z", bounds=(-1e5, 1e5), name="lungs")


@attack("withheld column")
def attack_scores_whose_record_it_is(_: World) -> Any:
    world = _world()
    who = torch.tensor([1, 1, 2, 2, 3, 3])
    rules = Policy(use=NOISED.use, release=NOISED.release, budget=Budget(epsilon=9, unit="person"))
    world.worker.catalogue.register("visits", {"x": SECRET.clone(), "who": who}, unit="person", person="who")
    world.owner.policies.register("visits", rules)
    person = TensorType("int64", (1,), (1,))
    program = _scored(call("sum.default", X), inputs=(Input("who", 1, person),))
    return _score(world, program, "who", name="visits", bounds=(0.0, 5.0))


@attack("answered")
def attack_scores_by_a_ledger_that_fails_in_between(_: World) -> Any:
    world = _world()
    world.done(Define(SUM))
    steps = world.door.work(_frame(Evaluate("heart", SUM.digest, ("x",), (0.0, 1e5))))
    try:
        for number in range(10**6):
            if number == 3:
                world.owner.ledger.close()
            next(steps)
    except StopIteration as end:
        return end.value.results or None
    return None


def _frame(*messages: Any) -> Any:
    return Frame(99, messages)


@attack("expiry")
def attack_uses_an_approved_score_after_its_time(_: World) -> Any:
    world = _world(PLAIN)
    _accepted(world)
    world.worker.gate._now = lambda: datetime(2999, 1, 1, tzinfo=UTC)  # type: ignore[method-assign]
    return _score(world)
