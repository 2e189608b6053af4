"""Mean scores: the owner's own loop makes them, of one record at a time, and what leaves is paid or accepted."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import housecall as hc
from housecall.errors import HousecallError, PolicyError, UsageError
from housecall.owner.policy import Budget, Metrics, Plans, Policy, Release, Use
from housecall.wire.messages import Define, Evaluate, Frame
from housecall.worker import statistics
from housecall.worker.limits import Limits
from housecall.worker.worker import Worker

torch.manual_seed(5)
X = torch.randn(60, 4)
Y = (X[:, 0] > 0).long()
WHO = torch.arange(60) // 3


def noised(noise: float = 5.0, epsilon: float = 10.0, unit: Any = "record", **more: Any) -> Policy:
    return Policy(
        use=Use(plans=("me",), **more),
        release=Release(metrics=Metrics(minimum=50, noise=noise)),
        budget=Budget(epsilon=epsilon, unit=unit),
    )


def exactly(ask: bool = False) -> Policy:
    """Without noise, of any program or of those that are asked for."""
    plans = Plans(ask=True) if ask else Plans(digests=("*",))
    return Policy(
        use=Use(plans=("me",), interactive=("me",)), plans=plans, release=Release(metrics=Metrics(minimum=50))
    )


def loss(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def here(score: Callable[..., torch.Tensor], model: nn.Module) -> float:
    """The same, of all records at once, without a worker."""
    with torch.no_grad():
        return float(score(model, X, Y))


def accuracy(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (model(x).argmax(1) == y).float().mean()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2)).eval()


@pytest.fixture
def clinic() -> Iterator[hc.VirtualWorker]:
    hook = hc.TorchHook(torch)
    yield hc.VirtualWorker(id="clinic")
    hook.remove()


def contract(clinic: Any) -> None:
    """What every worker does."""
    clinic.add("heart", x=X, y=Y, policy=noised())
    clinic.add("open", x=X, y=Y, policy=exactly())
    heart, model = clinic.dataset("heart"), net()
    found = heart.evaluate(loss, model, "x", "y", bounds=(0, 5))
    assert found.epsilon == pytest.approx(math.sqrt(2) / 5)
    assert found.scale == pytest.approx(5 / 60 / found.epsilon, rel=1e-5)
    assert found.left == pytest.approx(10 - found.epsilon)
    assert abs(found.value - here(loss, model)) < 40 * found.scale
    recorded = hc.record(accuracy, model, X[:1], Y[:1])
    assert abs(heart.evaluate(recorded, model, "x", "y", bounds=(0, 1)).value - here(accuracy, model)) < 1
    exact = clinic.dataset("open").evaluate(loss, model, "x", "y", bounds=(0, 5))
    assert exact.value == pytest.approx(here(loss, model), abs=1e-5)
    assert (exact.scale, exact.epsilon) == (0, 0)
    assert clinic.dataset("open").evaluate(loss, model, x="x", y="y", bounds=(0, 0.5)).value <= 0.5
    while heart.evaluate(accuracy, model, "x", "y", bounds=(0, 1)).left > math.sqrt(2) / 5:
        pass
    with pytest.raises(PolicyError, match=r"'clinic': the policy of data set 'heart' has 0\.1.* left of a budget"):
        heart.evaluate(accuracy, model, "x", "y", bounds=(0, 1))
    assert all(not isinstance(parameter, hc.PointerTensor) for parameter in model.parameters())


def test_a_virtual_worker_makes_them(clinic: hc.VirtualWorker) -> None:
    contract(clinic)


def test_a_worker_of_a_cluster_makes_them() -> None:
    hook = hc.TorchHook(torch)
    with hc.LocalCluster(("clinic",), threads=1) as cluster:
        contract(cluster["clinic"])
    hook.remove()


def test_a_model_that_is_there_is_scored_where_it_is(clinic: hc.VirtualWorker) -> None:
    clinic.add("heart", x=X, y=Y, policy=exactly())
    model = net()
    expected = here(loss, model)
    model.send(clinic)  # type: ignore[operator]  # the hook added it
    assert clinic.dataset("heart").evaluate(loss, model, "x", "y", bounds=(0, 9)).value == pytest.approx(
        expected, abs=1e-5
    )
    model.get()  # type: ignore[operator]  # as above: nothing private has touched it
    assert here(loss, model) == expected


# -- what is promised -------------------------------------------------------------------------------------------


class Recorded(list[tuple[int, Fraction]]):
    """Totals, each with the scale of the noise that it would get."""

    def __call__(self, total: int, scale: Fraction, below: Any) -> int:
        self.append((total, scale))
        return total


def measured(values: list[float], people: list[int] | None, slope: float) -> Recorded:
    """What the loop measures of a score, with its noise left out."""
    clinic, recorded = hc.VirtualWorker(id="clinic"), Recorded()
    policy = Policy(
        use=Use(plans=("me",)),
        release=Release(metrics=Metrics(minimum=1, noise=2)),
        budget=Budget(epsilon=10, unit="record" if people is None else "person"),
    )
    whose: dict[str, Any] = {} if people is None else {"who": torch.tensor(people), "unit": "person", "person": "who"}
    clinic.add("heart", x=torch.tensor(values, dtype=torch.float64), policy=policy, **whose)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "noised", recorded)
        clinic.dataset("heart").evaluate(lambda x: (slope * x).tan().sum(), "x", bounds=(-1, 2))
    return recorded


def test_no_record_decides_which_way_the_others_go(clinic: hc.VirtualWorker) -> None:
    """A run goes call by call, or by its precedent, which is kept of one in which nothing failed. What batch
    normalisation gives beside its result tells the two apart: zeros for each channel, or nothing at all."""

    def tells(x: torch.Tensor, table: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        is_she = x.sum() > 1000
        torch.index_select(table, 0, (~is_she).long().mul(7).view(1))  # fails on all but her; nobody reads it
        return torch.ones_like(torch.native_batch_norm(x, None, None, mean, var, False, 0.1, 1e-5)[1]).sum()

    others, found = torch.randn(60, 4), []
    for name, first in (("there", torch.full((1, 4), 500.0)), ("gone", others[:1])):
        clinic.add(name, x=torch.cat([first, others[1:]]), policy=exactly())
        given = torch.zeros(2), torch.zeros(4), torch.ones(4)
        found.append(clinic.dataset(name).evaluate(tells, "x", *given, bounds=(0, 4)).value)
    assert found[0] == found[1]


numbers = st.sampled_from([0.0, 1.0, -3.0, 1e300, math.inf, -math.inf, math.nan]) | st.floats(-5, 5)


def told_apart(one: Recorded, other: Recorded) -> float:
    assert [scale for _, scale in one] == [scale for _, scale in other]
    return float(sum((abs(a - b) / scale for (a, scale), (b, _) in zip(one, other, strict=True)), Fraction()))


@given(st.lists(numbers, min_size=1, max_size=6), numbers, st.data())
def test_a_record_that_is_replaced_is_hidden(values: list[float], value: float, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(values) - 1))
    other = [*values[:at], value, *values[at + 1 :]]
    assert told_apart(measured(values, None, 0.7), measured(other, None, 0.7)) <= math.sqrt(2) / 2 * (1 + 1e-12)


@given(st.lists(st.tuples(st.integers(0, 2), numbers), min_size=1, max_size=6), numbers)
def test_a_person_who_is_replaced_is_hidden(records: list[tuple[int, float]], value: float) -> None:
    people = [who for who, _ in records]
    values = [x for _, x in records]
    changed = [value if who == people[0] else x for who, x in records]
    assert told_apart(measured(values, people, 1), measured(changed, people, 1)) <= math.sqrt(2) / 2 * (1 + 1e-12)


def test_each_person_counts_once(clinic: hc.VirtualWorker) -> None:
    policy = Policy(use=Use(plans=("me",)), plans=Plans(digests=("*",)), release=Release(metrics=Metrics(minimum=1)))
    visits: dict[str, Any] = {"who": torch.tensor([1, 1, 1, 2]), "unit": "person", "person": "who"}
    clinic.add("visits", x=torch.tensor([0.0, 0.0, 0.0, 4.0]), policy=policy, **visits)
    assert clinic.dataset("visits").evaluate(lambda x: x.sum(), "x", bounds=(0, 8)).value == pytest.approx(2, abs=1e-5)


def test_a_record_that_fails_scores_the_least_and_nobody_is_told(
    clinic: hc.VirtualWorker, caplog: pytest.LogCaptureFixture
) -> None:
    """An index out of range, which zeros have not."""
    policy = Policy(use=Use(plans=("me",)), plans=Plans(digests=("*",)), release=Release(metrics=Metrics(minimum=1)))
    clinic.add("codes", code=torch.tensor([0, 1, 7, 2]), policy=policy)
    table = torch.tensor([[1.0], [2.0], [3.0]])

    def looked_up(table: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        return F.embedding(code, table).sum()

    found = clinic.dataset("codes").evaluate(looked_up, table, "code", bounds=(-1, 3))
    assert found.value == pytest.approx((1 + 2 - 1 + 3) / 4, abs=1e-5)
    assert "embedding.default failed on private data" in caplog.text


# -- what is no score -------------------------------------------------------------------------------------------


def dropping(model: Any, x: torch.Tensor) -> torch.Tensor:
    return F.dropout(x).sum()


@pytest.mark.parametrize(
    ("score", "inputs", "bounds", "error", "says"),
    [
        (loss, (net(), "x", "z"), (0, 1), UsageError, "'heart' has no column 'z'; it has x, y"),
        (loss, (net(), "x", "y"), (1, 0), UsageError, "bounds go up"),
        (loss, (net(), "x", "y"), (0, math.inf), UsageError, "finite"),
        (loss, (net(), "x", "y"), 1, UsageError, "bounds=(0, 1)"),
        (loss, (net(), X[:1], Y[:1]), (0, 1), UsageError, "name a column among the inputs"),
        (loss, (net().train(), "x", "y"), (0, 1), HousecallError, ""),  # torch's own: a batch of one
        (dropping, (None, "x"), (0, 1), UsageError, "a score draws nothing"),
        (lambda x: x * 2, ("x",), (0, 1), UsageError, "gives a float32[1, 4]"),
        (lambda x: (x.sum(), x.sum()), ("x",), (0, 1), UsageError, "gives 2 values: return one"),
        (lambda x: x.sum().to(torch.complex64), ("x",), (0, 1), UsageError, "one real number"),
        (lambda m, x: m.add_(x.sum()).sum(), (torch.zeros(1), "x"), (0, 1), UsageError, "changes nothing"),
        (lambda x: x[x > 0].sum(), ("x",), (0, 1), UsageError, "a shape that depends on values"),
        (lambda x: x.expand(10**6, 10**6, 4).add(1).sum(), ("x",), (0, 1), HousecallError, "expand|bytes|add"),
    ],
)
def test_what_is_no_score_is_refused_and_costs_nothing(
    clinic: hc.VirtualWorker, score: Callable[..., Any], inputs: Any, bounds: Any, error: type[Exception], says: str
) -> None:
    clinic.add("heart", x=X, y=Y, policy=noised())
    heart = clinic.dataset("heart")
    with pytest.raises((error, ValueError) if not says else error) as raised:
        heart.evaluate(score, *inputs, bounds=bounds)
    assert any(part in str(raised.value) for part in says.split("|"))
    assert heart.evaluate(accuracy, net(), "x", "y", bounds=(0, 1)).left == pytest.approx(10 - math.sqrt(2) / 5)


def test_all_but_the_record_is_public(clinic: hc.VirtualWorker) -> None:
    clinic.add("heart", x=X, y=Y, policy=noised(interactive=("me",)))
    heart = clinic.dataset("heart")
    weights = heart.column("x").mean(0)
    with pytest.raises(UsageError, match=r"derives from data set 'heart'.*have it released first"):
        heart.evaluate(lambda w, x: (x @ w).sum(), weights, "x", bounds=(0, 1))


def test_frames_by_hand_are_looked_at_as_well() -> None:
    clinic = hc.VirtualWorker(id="clinic")
    clinic.add("heart", x=X, y=Y, policy=noised())
    program = hc.record(lambda x: x.sum(), X[:1]).program
    two = hc.record(lambda x, y: x.sum() + y.sum(), X[:1], Y[:1]).program
    door = clinic.worker.open("me")

    def answer(*inputs: Any, digest: str = program.digest, bounds: Any = (0.0, 1.0)) -> str:
        message = Evaluate("heart", digest, inputs, bounds)
        reply = door.handle(Frame(1, (Define(program), Define(two), message)))
        door.halt.cause = None
        return reply.failures[0].reason if reply.failures else ""

    assert not answer("x")
    assert "no column 'who'" in answer("who")
    assert "is no value of this session" in answer("x", 7, digest=two.digest)
    assert "has 1 inputs, and 2 were given" in answer("x", "y")
    assert "and one record of column 'y' is int64[1]" in answer("y")
    assert "no program" in answer("x", digest="0" * 64)
    assert "bounds go up" in answer("x", bounds=(1.0, 1.0))
    assert "finite" in answer("x", bounds=(math.nan, 1.0))


def ended(steps: Iterator[None]) -> tuple[Any, int]:
    """The reply at the end of all steps, and how many there were."""
    count = 0
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value, count
        count += 1


# -- who may have one -------------------------------------------------------------------------------------------


def test_without_noise_an_owner_reads_the_program_first(clinic: hc.VirtualWorker) -> None:
    clinic.add("heart", x=X, y=Y, policy=exactly(ask=True))
    heart, model = clinic.dataset("heart"), net()
    with pytest.raises(PolicyError, match=r"plans\.ask.*metrics without noise.*Ask.*`dataset\.submit"):
        heart.evaluate(loss, model, "x", "y", bounds=(0, 5))
    with pytest.raises(UsageError, match="an owner wants to read why"):
        heart.submit(loss, model, "x", "y", bounds=(0, 5), reason=" ")
    answer = heart.submit(loss, model, "x", "y", bounds=(0, 5), reason="to see when to stop", runs=2)
    (request,) = clinic.owner.pending()
    assert "A SCORE: the program below runs on each record by itself" in request.program
    assert "clamped to 0.0 .. 5.0" in request.program
    assert "column 'x' of data set 'heart'" in request.program
    assert "nll_loss_forward" in request.program
    clinic.owner.approve(request.id, uses=2)
    answer.wait()
    with pytest.raises(PolicyError, match=r"plans\.ask"):  # approved was the one with these bounds
        heart.evaluate(loss, model, "x", "y", bounds=(0, 50))
    for _ in range(2):
        found = heart.evaluate(loss, model, "x", "y", bounds=(0, 5))
    assert found.value == pytest.approx(here(loss, model), abs=1e-5)
    with pytest.raises(PolicyError, match=r"plans\.ask"):
        heart.evaluate(loss, model, "x", "y", bounds=(0, 5))


def test_a_small_data_set_has_none(clinic: hc.VirtualWorker) -> None:
    clinic.add("few", x=X[:49], policy=noised())
    with pytest.raises(PolicyError, match=r"50 records at least, and it has 49 \(rule release\.metrics\.minimum\)"):
        clinic.dataset("few").evaluate(lambda x: x.sum(), "x", bounds=(0, 1))


def test_the_ledger_has_it_before_and_after(clinic: hc.VirtualWorker) -> None:
    clinic.add("heart", x=X, y=Y, policy=noised())
    clinic.add("open", x=X, y=Y, policy=exactly())
    for name in ("heart", "open"):
        clinic.dataset(name).evaluate(accuracy, net(), "x", "y", bounds=(0, 1))
    entries = [sealed.entry for sealed in clinic.owner.ledger.entries()]
    made = [(entry.kind, entry.data_sets[0], entry.of) for entry in entries if "a mean score" in entry.decision]
    paid = next(number for number, entry in enumerate(entries, 1) if entry.kind == "reserve")
    assert made == [
        ("reserve", "heart", None),
        ("release", "heart", paid),
        ("run", "open", None),
        ("release", "open", paid + 2),
    ]
    assert all(len(entry.program) == 64 for entry in entries if "a mean score" in entry.decision)


def test_a_loop_ends_when_the_time_of_a_session_is_over() -> None:
    """And others have had their turns in between: each call is a step."""
    ticks = iter(range(10**9))
    worker = Worker("clinic", Limits(compute_s=60.0), clock=lambda: float(next(ticks)))
    owner = hc.VirtualWorker(id="other").owner
    worker.gate = owner.gate
    worker.catalogue.register("heart", {"x": X.clone()})
    owner.policies.register("heart", noised())
    program = hc.record(lambda x: x.sum(), X[:1]).program
    door = worker.open("me")
    steps = door.work(Frame(1, (Define(program), Evaluate("heart", program.digest, ("x",), (0.0, 1.0)))))
    reply, count = ended(steps)
    assert count > 5
    assert reply.results == ()
    assert "computing time" in reply.failures[0].reason


def test_who_may_have_none_is_refused_before_her_program_is_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing of it is typed or run, not on zeros either."""
    clinic = hc.VirtualWorker(id="clinic")
    clinic.add("heart", x=X, y=Y, policy=noised())
    program = hc.record(lambda x: torch.linalg.cholesky(x.t() @ x).sum(), X[:1]).program
    door = clinic.worker.open("nobody")
    reply = door.handle(Frame(1, (Define(program), Evaluate("heart", program.digest, ("x",), (0.0, 1.0)))))
    assert "rule use.plans" in reply.failures[0].reason
    assert not door.plans._plan(program.digest).precedents
    assert "failed on private data" not in caplog.text


def test_a_right_that_ended_meanwhile_lets_nothing_out(clinic: hc.VirtualWorker) -> None:
    clinic.add("heart", x=X, y=Y, policy=noised())
    program = hc.record(lambda x: x.sum(), X[:1]).program
    door = clinic.worker.open("me")
    steps = door.work(Frame(1, (Define(program), Evaluate("heart", program.digest, ("x",), (0.0, 1.0)))))
    for _ in range(20):
        next(steps)
    clinic.owner.policies.register("heart", Policy(version=2))
    reply, _ = ended(steps)
    assert reply.results == ()
    assert "rule use.plans" in reply.failures[0].reason


def test_it_is_no_way_around_what_a_session_may_hold() -> None:
    worker = Worker("clinic", Limits(session_bytes=10_000))
    owner = hc.VirtualWorker(id="other").owner
    worker.gate = owner.gate
    worker.catalogue.register("heart", {"x": X.clone()})
    owner.policies.register("heart", noised())
    program = hc.record(lambda x: x.repeat(1_000, 1).sum(), X[:1]).program
    reply = worker.open("me").handle(Frame(1, (Define(program), Evaluate("heart", program.digest, ("x",), (0.0, 1.0)))))
    assert "LimitError: repeat.default" in reply.failures[0].reason
    assert not [sealed for sealed in owner.ledger.entries() if sealed.entry.kind == "reserve"]


def test_a_mean_of_data_that_was_replaced_meanwhile_stays() -> None:
    worker, owner = Worker("clinic"), hc.VirtualWorker(id="other").owner
    worker.gate = owner.gate
    worker.catalogue.register("heart", {"x": X.clone()})
    owner.policies.register("heart", noised())
    program = hc.record(lambda x: x.sum(), X[:1]).program
    steps = worker.open("me").work(Frame(1, (Define(program), Evaluate("heart", program.digest, ("x",), (0.0, 1.0)))))
    for _ in range(9):
        next(steps)
    worker.catalogue.register("heart", {"x": X + 1}, replace=True)
    try:
        while True:
            next(steps)
    except StopIteration as end:
        reply = end.value
    assert reply.results == ()
    assert "removed or replaced meanwhile" in reply.failures[0].reason


def test_the_time_of_a_session_ends_within_a_record_too() -> None:
    """That of zeros, before anybody is asked."""
    ticks = iter(range(10**9))
    worker = Worker("clinic", Limits(compute_s=60.0), clock=lambda: float(next(ticks)))
    owner = hc.VirtualWorker(id="other").owner
    worker.gate = owner.gate
    worker.catalogue.register("heart", {"x": X.clone()})
    owner.policies.register("heart", noised())
    program = hc.record(lambda x: functools.reduce(lambda y, _: y + 1, range(1000), x).sum(), X[:1]).program
    door = worker.open("me")
    steps = door.work(Frame(1, (Define(program), Evaluate("heart", program.digest, ("x",), (0.0, 1.0)))))
    reply, count = ended(steps)
    assert 10 < count < 100
    assert "computing time" in reply.failures[0].reason
