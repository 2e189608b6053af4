"""Attacks on statistics: more than the budget pays for, of what is not offered, with less noise than was promised."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from at_once import at_once
from hostile import World, attack

from housecall.errors import HousecallError
from housecall.owner.ledger import Ledger
from housecall.owner.policies import Policies, draft, sign
from housecall.owner.policy import Budget, Policy, Release, Use
from housecall.owner.signing import OwnerKey
from housecall.wire.messages import Noised, Statistic, Statistics
from housecall.worker import statistics
from housecall.worker.gate import Gate

AGES = 20.0 + torch.arange(60.0)
MEAN = Statistic("mean", "age", (0.0, 120.0))


def _rules(epsilon: float = 1.0, who: str = "mallory", unit: Any = "record", **more: Any) -> Policy:
    budget = Budget(epsilon=epsilon, unit=unit)
    return Policy(use=Use(statistics=(who,)), release=Release(statistics=True), budget=budget, **more)


def _add(world: World, name: str = "ages", policy: Policy | None = None, age: torch.Tensor = AGES, **more: Any) -> None:
    world.worker.catalogue.register(name, {"age": age.clone(), **more.pop("columns", {})}, **more)
    world.owner.policies.register(name, policy or _rules())


def _ask(world: World, epsilon: float = 0.4, what: Statistic = MEAN, name: str = "ages") -> float | None:
    """The first value of an answer; `None` if it is refused."""
    for result in world.frame(Statistics(name, what, epsilon)).results:
        assert isinstance(result, Noised)
        return result.values[0]
    return None


# -- more than the budget -------------------------------------------------------------------------------------


@attack("spent")
def attack_averages_the_same_question(world: World) -> Any:
    _add(world)
    answers = [_ask(world) for _ in range(3)]
    assert None not in answers[:2]
    return answers[2]


@attack("spent")
def attack_sends_a_frame_of_statistics_again(world: World) -> Any:
    """A frame that comes again is no frame of before to a session: what it asks for costs again."""
    _add(world)
    again = [world.frame(*[Statistics("ages", MEAN, 0.4)] * 2).results for _ in range(2)]
    assert len(again[0]) == 2
    return again[1] or None


@attack("spent")
def attack_overspends_in_parallel(world: World) -> Any:
    _add(world)
    catalogue, gate, out = world.worker.catalogue, world.worker.gate, []

    def ask() -> None:
        try:
            out.append(statistics.answer(catalogue, gate, world.door.who, Statistics("ages", MEAN, 0.4)))
        except HousecallError:
            return

    at_once(*[ask] * 8)
    assert len(out) >= 2
    return None if len(out) == 2 else out


@attack("spent")
def attack_has_another_ask_for_her(world: World) -> Any:
    """What one may not spend any more, two may not."""
    _add(world, policy=_rules(who="*"))
    assert _ask(world, 0.9) is not None
    reply = world.frame(Statistics("ages", MEAN, 0.9), door=world.opened("alice", load=False))
    return reply.results or None


@attack("content")
def attack_asks_under_another_name(world: World) -> Any:
    _add(world)
    _add(world, "again")
    assert _ask(world, 0.8) is not None
    return _ask(world, 0.8, name="again")


@attack("content")
def attack_asks_once_more_after_the_same_data_was_added_again(world: World) -> Any:
    _add(world)
    assert _ask(world, 0.8) is not None
    _add(world, replace=True)
    return _ask(world, 0.8)


@attack("spent")
def attack_asks_again_under_a_new_version_of_the_policy(world: World) -> Any:
    _add(world)
    assert _ask(world, 0.8) is not None
    world.owner.policies.register("ages", _rules(version=2))
    return _ask(world, 0.8)


@attack("recounted")
def attack_asks_again_after_a_crash_between_payment_and_answer(world: World) -> Any:
    _add(world)
    gate, ledger = world.worker.gate, world.owner.ledger
    catalogue = world.worker.catalogue
    gate.statistics(world.door.who, statistics.registered(catalogue, catalogue.owned("ages")), 0.8, "a mean")
    world.worker.gate = Gate(world.owner.policies, world.owner.requests, ledger)  # the worker starts anew
    return _ask(world, 0.8)


@attack("paid")
def attack_asks_while_the_ledger_cannot_be_written(world: World) -> Any:
    _add(world)
    world.owner.ledger.close()
    return _ask(world)


@attack("answered")
def attack_is_answered_by_a_ledger_that_fails_in_between(world: World) -> Any:
    _add(world)
    gate = world.worker.gate

    def paid(*args: Any) -> Any:
        sealed = Gate.statistics(gate, *args)
        world.owner.ledger.close()
        return sealed

    gate.statistics = paid  # type: ignore[method-assign]  # so that the ledger fails just then
    return _ask(world)


@attack("versions")
def attack_puts_an_old_budget_back(world: World) -> Any:
    """The owner has lowered the budget; the old file, which she signed, is put back."""
    with TemporaryDirectory() as folder:
        place = Path(folder)
        key = OwnerKey.create(place)
        (place / "policies").mkdir()
        policies = Policies(place, key.public)
        gate = world.worker.gate = Gate(policies, None, Ledger())
        for version, epsilon in ((1, 5.0), (2, 0.5)):
            (place / "policies" / "ages.toml").write_text(_rules(epsilon, version=version).text())
            sign(place, draft(place, "ages", key.public), key)
            assert gate.policies["ages"].budget.epsilon == epsilon
            if version == 1:
                old = {path: path.read_bytes() for path in (place / "policies").glob("ages.*")}
        for path, content in old.items():
            path.write_bytes(content)
        world.worker.catalogue.register("ages", {"age": AGES})
        return _ask(world, 2.0)


# -- what may not be asked ------------------------------------------------------------------------------------


@attack("policy")
def attack_asks_where_another_may(world: World) -> Any:
    _add(world, policy=_rules(who="alice"))
    return _ask(world)


@attack("policy")
def attack_asks_after_the_end(world: World) -> Any:
    _add(world, policy=_rules(expires=datetime(2020, 1, 1, tzinfo=UTC)))
    return _ask(world)


@attack("offered")
def attack_asks_for_the_column_of_persons(world: World) -> Any:
    columns = {"who": torch.arange(60) // 2}
    _add(world, policy=_rules(unit="person"), columns=columns, unit="person", person="who")
    return _ask(world, what=Statistic("mean", "who", (0.0, 30.0)))


@attack("same data")
def attack_has_the_data_replaced_between_decision_and_reading(world: World) -> Any:
    """What lies under the name by then is data that nobody decided on."""
    _add(world)
    catalogue = world.worker.catalogue

    def late(name: str) -> Any:
        catalogue.register("ages", {"age": AGES + 1}, replace=True)
        return type(catalogue).whole(catalogue, name)

    catalogue.whole = late  # type: ignore[method-assign]  # so that it happens just then
    return _ask(world)


@attack(because="the question is checked, and the budget would not pay for it")
def attack_asks_at_a_cost_that_is_none(world: World) -> Any:
    _add(world)
    costs = (0.0, -0.0, -1.0, math.nan, math.inf, -math.inf, 1e300, 5e-324)
    return [cost for cost in costs if _ask(world, cost) is not None] or None


@attack(because="the question is checked, and nothing could be made of such bounds")
def attack_asks_between_bounds_that_are_none(world: World) -> Any:
    _add(world)
    inf, kinds = math.inf, ("sum", "mean", "count", "histogram")
    bounds = ((), (1.0,), (math.nan, 1.0), (-inf, inf), (-1e308, 1e308), (120.0, 0.0), (50.0, 50.0))
    asked = [Statistic(kind, "age", each) for kind in kinds for each in bounds]
    return [what for what in asked if _ask(world, 0.01, what) is not None] or None


# -- less noise than was promised -----------------------------------------------------------------------------


@attack("noise")
def attack_reads_the_exact_sum(world: World) -> Any:
    """By chance it would be exact once in millions."""
    _add(world)
    found = _ask(world, what=Statistic("sum", "age", (0.0, 128.0)))
    return found if found == AGES.double().sum().item() else None


@attack("whole steps")
def attack_reads_the_low_bits_of_the_noise(world: World) -> Any:
    """Mironov 2012: a sum with noise made of floats has low bits that depend on the sum."""
    _add(world)
    found = _ask(world, what=Statistic("sum", "age", (0.0, 128.0)))
    assert found is not None
    return None if (Fraction(found) * 2**13).denominator == 1 else found


@attack("clamped")
def attack_finds_the_one_record_that_is_far_off(world: World) -> Any:
    _add(world, policy=_rules(epsilon=1000), age=torch.cat([AGES, torch.tensor([1e9])]))
    found = _ask(world, 100.0)
    assert found is not None
    return found if found > 1000 else None


@attack("one contribution")
def attack_finds_the_one_person_with_many_records(world: World) -> Any:
    columns = {"who": torch.zeros(60, dtype=torch.int64)}
    _add(world, policy=_rules(1000, unit="person"), columns=columns, unit="person", person="who")
    found = _ask(world, 100.0, Statistic("sum", "age", (0.0, 120.0)))
    assert found is not None
    return found if found > 1000 else None


@attack("refused alike")
def attack_learns_what_is_left_without_being_named(world: World) -> Any:
    """Who may not ask is told nothing of what others have spent."""
    _add(world, policy=_rules(who="alice"))
    said = []
    for spent in (0.0, 0.5):
        if spent:
            message = Statistics("ages", MEAN, spent)
            assert world.frame(message, door=world.opened("alice", load=False)).results
        said.append([failure.reason for failure in world.frame(Statistics("ages", MEAN, 2.0)).failures])
    return None if said[0] == said[1] else said
