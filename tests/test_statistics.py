"""Statistics: noise as it is specified, what one unit changes at most, paid before it is made, never overspent."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import housecall as hc
from housecall.cli.main import app
from housecall.cli.status import read_status
from housecall.errors import DataError, LedgerError, PolicyError, UsageError
from housecall.owned.catalogue import Catalogue
from housecall.owner.ledger import Ledger
from housecall.owner.policy import Budget, Policy, Release, Use
from housecall.privacy.laplace import laplace
from housecall.wire.messages import Frame, Noised, Statistic, Statistics
from housecall.worker import statistics as module
from housecall.worker.gate import Gate, Who
from housecall.worker.limits import Limits
from housecall.worker.worker import Worker

ME = Who("me", "scientist")
X = torch.arange(1000.0) % 100


def open_to(who: str = "me", epsilon: float = 10.0, unit: Any = "record") -> Policy:
    return Policy(
        use=Use(statistics=(who,)), release=Release(statistics=True), budget=Budget(epsilon=epsilon, unit=unit)
    )


# -- noise ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [Fraction(1), Fraction(10), Fraction(1, 3), Fraction(7, 3), Fraction(100, 7)])
def test_noise_has_exactly_its_distribution(scale: Fraction) -> None:
    """Chi-square of 20,000 draws of a seeded generator, over values of at least 20 expected draws and both tails."""
    draws, below = 20_000, random.Random(20260301).randrange
    found = Counter(laplace(scale, below) for _ in range(draws))
    ratio = math.exp(-1 / scale)
    at_zero = (1 - ratio) / (1 + ratio)
    expected = {0: at_zero * draws}
    size = 1
    while at_zero * ratio**size * draws >= 20:
        expected[size] = expected[-size] = at_zero * ratio**size * draws
        size += 1
    tail = at_zero * ratio**size / (1 - ratio) * draws
    seen = {value: found.pop(value, 0) for value in expected}
    tails = [(sum(n for value, n in found.items() if (value > 0) == up), tail) for up in (True, False)]
    pairs = [(seen[value], wanted) for value, wanted in expected.items()] + [pair for pair in tails if tail > 5]
    statistic, freedom = sum((n - wanted) ** 2 / wanted for n, wanted in pairs), len(pairs) - 1
    # Five standard deviations of the chi-square distribution, which has the mean `freedom` and twice that variance.
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 1


def test_noise_is_drawn_anew_each_time(clinic: hc.VirtualWorker) -> None:
    clinic.add("heart", x=X, policy=open_to())
    mean = hc.Mean("x", 0, 100)
    values = {clinic.dataset("heart").statistics(mean, epsilon=0.01).value for _ in range(5)}
    assert len(values) == 5


# -- what one unit changes ------------------------------------------------------------------------------------

numbers = st.one_of(st.floats(-200, 200), st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 50.0]))
bounds = st.tuples(st.floats(-100, 100), st.floats(0.01, 150)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@st.composite
def asked(draw: st.DrawFn) -> Statistic:
    kind = draw(st.sampled_from(["count", "sum", "mean", "histogram"]))
    if kind == "histogram":
        return Statistic(
            kind,
            "x",
            tuple(
                sorted(draw(st.sets(st.integers(-9, 9), min_size=2))),
            ),
        )
    return Statistic(kind, "x", draw(bounds))


class Recorded(list[tuple[int, Fraction]]):
    """Totals, each with the scale of the noise that it would get."""

    def __call__(self, total: int, scale: Fraction, below: Any) -> int:
        self.append((total, scale))
        return total


def measured(data: dict[str, list[float]], what: Statistic, epsilon: float, person: bool) -> Recorded:
    """What is measured, with its noise left out."""
    catalogue, recorded = Catalogue(), Recorded()
    columns = {"x": torch.tensor(data["x"], dtype=torch.float64), "who": torch.tensor(data["who"])}
    options: dict[str, Any] = {"unit": "person", "person": "who"} if person else {}
    catalogue.register("heart", columns, **options)
    gate = Gate({"heart": open_to(epsilon=10.0, unit="person" if person else "record")}, ledger=Ledger())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "noised", recorded)
        module.answer(catalogue, gate, ME, Statistics("heart", what, epsilon))
    return recorded


def loss(one: Recorded, other: Recorded) -> Fraction:
    """The epsilon by which the two can be told apart, at most: noise is independent, so losses add up."""
    assert [scale for _, scale in one] == [scale for _, scale in other]  # a scale must not tell either
    return sum((abs(a - b) / scale for (a, scale), (b, _) in zip(one, other, strict=True)), Fraction())


@given(asked(), st.lists(numbers, min_size=1, max_size=8), st.data())
def test_a_record_that_is_replaced_is_hidden(what: Statistic, values: list[float], data: st.DataObject) -> None:
    at, value = data.draw(st.integers(0, len(values) - 1)), data.draw(numbers)
    other = [value if place == at else old for place, old in enumerate(values)]
    who = list(range(len(values)))
    both = [measured({"x": x, "who": who}, what, 0.7, person=False) for x in (values, other)]
    assert loss(*both) <= Fraction("0.7")


@given(asked(), st.lists(st.tuples(st.integers(0, 3), numbers), min_size=2, max_size=9), st.data())
def test_a_person_who_is_gone_or_replaced_is_hidden(
    what: Statistic, records: list[tuple[int, float]], data: st.DataObject
) -> None:
    gone = data.draw(st.integers(0, 3))
    others = [record for record in records if record[0] != gone]
    fresh = data.draw(st.lists(st.tuples(st.just(gone), numbers), max_size=4))
    place = data.draw(st.integers(0, len(others)))
    changed = others[:place] + fresh + others[place:]
    if changed:
        columns = [{"x": [x for _, x in one], "who": [who for who, _ in one]} for one in (records, changed)]
        assert loss(*(measured(one, what, 0.7, person=True) for one in columns)) <= Fraction("0.7")


@given(asked(), st.lists(st.tuples(st.integers(0, 3), numbers), min_size=1, max_size=9), st.booleans())
def test_without_noise_it_is_what_the_plain_twin_says(
    what: Statistic, records: list[tuple[int, float]], person: bool
) -> None:
    values, who = [x for _, x in records], [name for name, _ in records]
    catalogue = Catalogue()
    options: dict[str, Any] = {"unit": "person", "person": "who"} if person else {}
    catalogue.register("heart", {"x": torch.tensor(values, dtype=torch.float64), "who": torch.tensor(who)}, **options)
    gate = Gate({"heart": open_to(unit="person" if person else "record")}, ledger=Ledger())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "noised", lambda total, scale, below: total)
        found = module.answer(catalogue, gate, ME, Statistics("heart", what, 1.0)).values
    assert found == pytest.approx(twin(what, values, who if person else list(range(len(who)))), abs=1e-2)


def twin(what: Statistic, values: list[float], who: list[int]) -> list[float]:
    """The definitions, one unit after the other."""
    low, high = what.bounds[0], what.bounds[-1]
    units = [[x for x, name in zip(values, who, strict=True) if name == unit] for unit in sorted(set(who))]
    clamped = [[min(max(low if math.isnan(x) else x, low), high) for x in unit] for unit in units]
    if what.kind == "count":
        return [sum(any(low <= x <= high for x in unit) for unit in units)]
    if what.kind == "sum":
        most = 64 * max(abs(low), abs(high))
        plain = [sum(min(max(low if math.isnan(x) else x, -most), most) for x in unit) for unit in units]
        return [sum(min(max(x, low), high) for x in plain)]
    if what.kind == "mean":
        return [sum(sum(unit) / len(unit) for unit in clamped) / len(units)]
    firsts = [unit[0] for unit in units]
    pairs = list(zip(what.bounds, what.bounds[1:], strict=False))
    return [sum(a <= x < b or (x == b == high) for x in firsts) for a, b in pairs]


def test_a_column_is_gone_over_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 7)
    monkeypatch.setattr(module, "noised", lambda total, scale, below: total)
    catalogue = Catalogue()
    catalogue.register("heart", {"x": X, "who": torch.arange(1000) // 4}, unit="person", person="who")
    gate = Gate({"heart": open_to(unit="person")}, ledger=Ledger())
    found = module.answer(catalogue, gate, ME, Statistics("heart", Statistic("mean", "x", (0.0, 100.0)), 1.0))
    assert found.values[0] == pytest.approx(49.5, abs=1e-3)


@given(st.integers(1, 20_000), st.sampled_from([-1, 1]))
def test_sums_that_are_far_from_zero_do_not_wrap(people: int, sign: int) -> None:
    catalogue, recorded = Catalogue(), Recorded()
    bounds = tuple(sorted((sign * 1e9, sign * (1e9 + 1.5))))
    x = torch.full((people,), sign * 1e9 + sign, dtype=torch.float64)
    catalogue.register("heart", {"x": x, "who": torch.arange(people)}, unit="person", person="who")
    gate = Gate({"heart": open_to(unit="person")}, ledger=Ledger())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "noised", recorded)
        found = module.answer(catalogue, gate, ME, Statistics("heart", Statistic("sum", "x", bounds), 1.0))
    assert found.values[0] == pytest.approx(people * sign * (1e9 + 1), rel=1e-12)
    assert abs(recorded[0][0]) <= people * recorded[0][1]


# -- as it is asked for ---------------------------------------------------------------------------------------


def contract(clinic: Any) -> None:
    """What holds at every worker: asked, paid, answered; at the end refused."""
    heart = clinic.dataset("heart")
    mean = heart.statistics(hc.Mean("x", 0, 100), epsilon=4)
    assert mean.value == pytest.approx(49.5, abs=2)
    assert mean[1:] == (pytest.approx(100 / 1000 / 4, rel=1e-6), 4.0, 6.0)
    total = heart.statistics(hc.Sum("x", 0, 100), epsilon=2)
    assert total.value == pytest.approx(49_500, abs=2_000)
    histogram = heart.statistics(hc.Histogram("x", range(0, 101, 25)), epsilon=2)
    assert len(histogram.value) == 4
    assert all(count == int(count) and abs(count - 250) < 50 for count in histogram.value)
    assert heart.statistics(hc.Count("table", 2, 3, index=(1,)), epsilon=1).left == 1
    with pytest.raises(
        PolicyError, match=r"'heart' has 1 left of a budget of epsilon 10 for each record, and this cos"
    ):
        heart.statistics(hc.Count("x", 0, 9), epsilon=1.5)
    visits = clinic.dataset("visits")
    assert visits.statistics(hc.Count(), epsilon=5).value == pytest.approx(250, abs=10)
    assert visits.statistics(hc.Mean("x", 0, 100), epsilon=4).value == pytest.approx(49.5, abs=10)
    with pytest.raises(PolicyError, match=r"'closed' does not let 'me' ask for statistics of it \(rule use.statistics"):
        clinic.dataset("closed").statistics(hc.Count("x", 0, 1), epsilon=1)


def furnished(clinic: Any) -> None:
    clinic.add("heart", x=X, table=torch.ones(1000, 3), policy=open_to())
    visits: dict[str, Any] = {"unit": "person", "person": "who", "policy": open_to(unit="person")}
    clinic.add("visits", x=X, who=torch.arange(1000) // 4, **visits)
    clinic.add("closed", x=X, policy=open_to("alice"))


def test_a_virtual_worker_answers(clinic: hc.VirtualWorker) -> None:
    furnished(clinic)
    contract(clinic)


@pytest.fixture(scope="module")
def cluster() -> Iterator[hc.LocalCluster]:
    with hc.LocalCluster(("clinic",), threads=1) as made:
        yield made


def test_a_worker_of_a_cluster_answers(cluster: hc.LocalCluster) -> None:
    furnished(cluster["clinic"])
    contract(cluster["clinic"])


@pytest.mark.parametrize(
    ("make", "epsilon", "reason"),
    [
        (lambda: hc.Mean("x", 0, 1), math.nan, "epsilon nan"),
        (lambda: hc.Mean("x", 0, 1), -1, r"epsilon -1.0"),
        (lambda: hc.Mean("x", 0, 1), 0, "epsilon 0.0"),
        (lambda: hc.Mean("x", 0, 1), math.inf, "epsilon inf"),
        (lambda: hc.Mean("x", 0, 1), 1e-9, "epsilon 1e-09"),
        (lambda: hc.Mean("x", 0, 1), "1", "epsilon is a number"),
        (lambda: hc.Mean("x", 1, 0), 1, "go up"),
        (lambda: hc.Mean("x", 1, 1), 1, "go up"),
        (lambda: hc.Mean("x", math.nan, 1), 1, "finite"),
        (lambda: hc.Mean("x", 0, 1e200), 1, "finite"),
        (lambda: hc.Mean("x", 1e9, 1e9 + 1e-3), 1, "too near"),
        (lambda: hc.Mean("x", 0, 1e-300), 1, "too near"),
        (lambda: hc.Mean("z", 0, 1), 1, "no column 'z'; it offers x, table, c"),
        (lambda: hc.Mean("c", 0, 1), 1, "complex"),
        (lambda: hc.Mean("table", 0, 1), 1, "name which by index="),
        (lambda: hc.Mean("table", 0, 1, index=3), 1, "name which by index="),
        (lambda: hc.Mean("table", 0, 1, index=-1), 1, "name which by index="),
        (lambda: hc.Mean("x", 0, 1, index=0), 1, "name which by index="),
        (lambda: hc.Mean("x", "a", 1), 1, "are numbers"),  # type: ignore[arg-type]  # tried
        (lambda: hc.Mean(3, 0, 1), 1, "is a name"),  # type: ignore[arg-type]  # tried
        (lambda: hc.Count(), 1, "no secret"),
        (lambda: hc.Count("x"), 1, "between two bounds"),
        (lambda: hc.Count("", 0, 1), 1, "between two bounds"),
        (lambda: hc.Histogram("x", [1]), 1, "found 1"),
        (lambda: hc.Histogram("x", [0, 1, 1]), 1, "go up"),
        (lambda: hc.Histogram("x", range(20_000)), 1, "found 20,000"),
        (lambda: "mean", 1, "Count, Sum, Mean or Histogram"),
    ],
)
def test_what_cannot_be_asked_costs_nothing(
    clinic: hc.VirtualWorker, make: Callable[[], Any], epsilon: Any, reason: str
) -> None:
    clinic.add("heart", x=X, table=torch.ones(1000, 3), c=torch.ones(1000) * 1j, policy=open_to())
    with pytest.raises(UsageError, match=reason):
        clinic.dataset("heart").statistics(make(), epsilon=epsilon)
    assert clinic.dataset("heart").statistics(hc.Count("x", 0, 1), epsilon=1).left == 9


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.uint16, torch.uint64])
def test_columns_of_any_real_dtype_are_counted(clinic: hc.VirtualWorker, dtype: torch.dtype) -> None:
    clinic.add("heart", x=(torch.arange(100) % 2).to(dtype)[:, None], policy=open_to())
    assert clinic.dataset("heart").statistics(hc.Sum("x", 0, 1), epsilon=9).value == pytest.approx(50, abs=5)


# -- paid first, of the data ----------------------------------------------------------------------------------


def made(x: torch.Tensor = X, ledger: Ledger | None = None, epsilon: float = 1.0) -> tuple[Catalogue, Gate]:
    catalogue = Catalogue()
    catalogue.register("heart", {"x": x})
    return catalogue, Gate({"heart": open_to(epsilon=epsilon), "again": open_to()}, ledger=ledger or Ledger())


def ask(catalogue: Catalogue, gate: Gate, epsilon: float, name: str = "heart") -> Noised:
    return module.answer(catalogue, gate, ME, Statistics(name, Statistic("mean", "x", (0.0, 100.0)), epsilon))


def test_it_is_in_the_ledger_before_an_element_is_read() -> None:
    catalogue, gate = made()

    def unread(name: str) -> Any:
        assert gate.ledger is not None
        (reserved,) = gate.ledger.entries()
        assert (reserved.entry.kind, reserved.entry.privacy.epsilon) == ("reserve", 0.5)  # type: ignore[union-attr]
        raise RuntimeError("the disk failed")

    catalogue.whole = unread  # type: ignore[method-assign]  # what reads the elements
    with pytest.raises(RuntimeError, match="the disk failed"):
        ask(catalogue, gate, 0.5)
    del catalogue.whole
    with pytest.raises(PolicyError, match=r"has 0\.5 left"):  # it stays spent
        ask(catalogue, gate, 0.6)


def test_entries_say_what_was_made_for_whom_and_at_what_cost() -> None:
    catalogue, gate = made()
    ask(catalogue, gate, 0.25)
    with pytest.raises(PolicyError):
        ask(catalogue, gate, 2)
    assert gate.ledger is not None
    first, second, third = (sealed.entry for sealed in gate.ledger.entries())
    assert (first.kind, second.kind, second.of, third.kind) == ("reserve", "release", 1, "refusal")
    assert first.decision == second.decision == "a mean of 'x' between 0.0 and 100.0: allowed by heart"
    assert first.principal == second.principal == "scientist 'me'"
    assert first.privacy == second.privacy
    assert first.identity == catalogue.content("heart")
    assert "has 0.75 left" in third.decision


def test_the_budget_is_of_the_data_and_not_of_its_name() -> None:
    catalogue, gate = made()
    ask(catalogue, gate, 0.75)
    catalogue.register("again", {"x": X.clone()})
    assert ask(catalogue, gate, 1, "again").left == 8.25
    catalogue.register("heart", {"x": X.clone()}, replace=True)
    with pytest.raises(PolicyError, match="has 0 left"):
        ask(catalogue, gate, 0.5)
    catalogue.register("heart", {"x": X + 1}, replace=True)
    assert ask(catalogue, gate, 0.5).left == 0.5


def test_sums_are_of_the_numbers_as_written() -> None:
    catalogue, gate = made(epsilon=0.3)
    for _ in range(3):
        ask(catalogue, gate, 0.1)  # as floats, 0.1 + 0.1 + 0.1 > 0.3
    with pytest.raises(PolicyError, match="has 0 left"):
        ask(catalogue, gate, 1e-6)


def test_a_worker_that_starts_anew_knows_what_is_spent(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir(mode=0o700)
    with Ledger(tmp_path / "w") as ledger:
        ask(*made(ledger=ledger), 0.75)
    with Ledger(tmp_path / "w") as ledger, pytest.raises(PolicyError, match=r"has 0\.25 left"):
        ask(*made(ledger=ledger), 0.5)


def test_without_a_ledger_nothing_is_made() -> None:
    catalogue, gate = made()
    assert gate.ledger is not None
    gate.ledger.close()
    with pytest.raises(LedgerError):
        ask(catalogue, gate, 0.5)
    with pytest.raises(LedgerError, match="keeps no ledger"):
        ask(catalogue, Gate({"heart": open_to()}), 0.5)


def test_a_budget_of_another_unit_pays_nothing() -> None:
    catalogue, _ = made()
    with pytest.raises(PolicyError, match="counts its budget by person, and the data protects each record"):
        ask(catalogue, Gate({"heart": open_to(unit="person")}, ledger=Ledger()), 0.5)


def test_a_failure_says_nothing_of_the_data(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    catalogue, gate = made()

    def fails(*args: Any) -> Any:
        raise RuntimeError("element 7 is 42")

    monkeypatch.setitem(module._MADE, ("mean", "record"), fails)
    with pytest.raises(DataError, match="could not be made; the details are in the owner's log") as caught:
        ask(catalogue, gate, 0.5)
    assert "42" not in str(caught.value)
    assert "element 7 is 42" in caplog.text


def test_a_session_that_has_no_time_left_asks_in_vain() -> None:
    catalogue, gate = made()
    door = Worker("clinic", Limits(compute_s=0.0), catalogue=catalogue, gate=gate).open("me")
    (failure,) = door.handle(Frame(1, (Statistics("heart", Statistic("mean", "x", (0.0, 1.0)), 0.5),))).failures
    assert "used up its 0 s of computing time" in failure.reason
    assert gate.ledger is not None
    assert list(gate.ledger.entries()) == []


def test_data_that_was_replaced_meanwhile_is_not_answered() -> None:
    catalogue, gate = made()
    whole = catalogue.whole

    def replaced(name: str) -> Any:
        catalogue.register("heart", {"x": X + 1}, replace=True)
        return whole(name)

    catalogue.whole = replaced  # type: ignore[method-assign]  # so it happens between the decision and the reading
    with pytest.raises(PolicyError, match="removed or replaced meanwhile"):
        ask(catalogue, gate, 0.5)


# -- told to the owner ----------------------------------------------------------------------------------------


def test_an_owner_is_told_what_is_spent_and_what_is_left(cluster: hc.LocalCluster) -> None:
    clinic = cluster["clinic"]
    folder = str(clinic.folder)
    clinic.add("told", x=X * 2, policy=open_to(epsilon=3))
    clinic.add("gone", x=X * 3, policy=open_to(epsilon=3))
    for name in ("told", "gone"):
        clinic.dataset(name).statistics(hc.Count("x", 0, 9), epsilon=0.75)
    Catalogue(folder).remove("gone")
    told = "epsilon 0.75 of 3 is spent for each record, 2.25 is left"
    shown = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["worker", "ledger", "--folder", folder]).output
    assert f"budget of told: {told}" in shown
    assert "ε 0.75, δ 0 per record" in shown
    assert "paid: entry" in shown
    assert "data that is not here any more, or was replaced: epsilon 0.75 and rho 0 in all" in shown
    explained = CliRunner().invoke(app, ["worker", "policy", "explain", "told", "--folder", folder]).output
    assert "May have statistics" in explained
    assert explained.endswith(f"budget of told: {told}\n")
    while "told" not in (read_status(clinic.folder) or {}).get("budgets", {}):
        time.sleep(0.1)  # it says something each second
    status = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["worker", "status", "--folder", folder]).output
    assert f"budget of 'told': {told}" in status


def test_a_budget_that_was_lowered_below_what_is_spent_has_nothing_left() -> None:
    catalogue, gate = made(epsilon=1)
    ask(catalogue, gate, 0.75)
    lowered = Gate({"heart": open_to(epsilon=0.5)}, ledger=gate.ledger)
    assert module.budgets(catalogue, lowered) == {"heart": "epsilon 0.75 of 0.5 is spent for each record, 0 is left"}
    with pytest.raises(PolicyError, match=r"has 0 left of a budget of epsilon 0\.5"):
        ask(catalogue, lowered, 0.1)
