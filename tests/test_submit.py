"""Programs that are submitted: their owner reads them, and they run on her data and on nothing else."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from at_once import at_once
from hypothesis import given, settings
from hypothesis import strategies as st
from test_labels import programs
from torch import nn
from torch.nn import functional as F

import housecall as hc
from housecall.owner.approvals import Requests
from housecall.owner.ledger import Account
from housecall.owner.policies import draft, sign
from housecall.owner.policy import Plans, Policy, Release, Use
from housecall.owner.signing import OwnerKey
from housecall.program.call import Call, Input, Items
from housecall.transport.arrays import share
from housecall.transport.parcel import packed
from housecall.types import Ref, TensorType
from housecall.wire.messages import (
    Array,
    Clear,
    Define,
    Describe,
    Drop,
    Fetch,
    Frame,
    Heard,
    Load,
    Put,
    Request,
    Requested,
    Run,
    Seed,
    Status,
    Submit,
)
from housecall.worker import private
from housecall.worker.gate import Gate
from housecall.worker.owner import Owner, gate_of
from housecall.worker.worker import Worker, WorkerSession

ASKED = Policy(use=Use(plans=("me",)), plans=Plans(ask=True), release=Release(approvals=True))
X, Y = torch.randn(20, 3, generator=torch.Generator().manual_seed(1)), torch.arange(20.0) / 20
ROWS = torch.arange(8)


def step(model: nn.Module, x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor, optimizer: Any) -> torch.Tensor:
    optimizer.zero_grad()
    loss = F.mse_loss(model(x.index_select(0, rows)).squeeze(1), y.index_select(0, rows))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


class Study:
    """A scientist's model and her recorded step, at a worker with an owner's data."""

    def __init__(self, clinic: Any) -> None:
        torch.manual_seed(0)
        self.clinic = clinic
        self.model = nn.Linear(3, 1)
        self.start = {name: value.clone() for name, value in self.model.state_dict().items()}
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.step = hc.record(lambda model, x, y, rows: step(model, x, y, rows, optimizer), self.model, X, Y, ROWS)
        self.model.send(clinic)
        heart = clinic.dataset("heart")
        self.x, self.y, self.rows = heart.column("x"), heart.column("y"), ROWS.send(clinic)

    def submit(self, **options: Any) -> Any:
        return self.step.submit(self.model, self.x, self.y, self.rows, **{"reason": "for the paper", **options})

    def run(self) -> Any:
        return self.step(self.model, self.x, self.y, self.rows)

    def expected(self, runs: int) -> nn.Module:
        """What the same steps give on the records themselves."""
        model = nn.Linear(3, 1)
        model.load_state_dict(self.start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(runs):
            step(model, X, Y, ROWS, optimizer)
        return model


@pytest.fixture(params=["direct", "codec"])
def clinic(request: pytest.FixtureRequest) -> hc.VirtualWorker:
    worker = hc.VirtualWorker(id="clinic", codec=request.param == "codec")
    worker.add("heart", x=X.clone(), y=Y.clone(), policy=ASKED)
    return worker


@pytest.fixture
def study(clinic: hc.VirtualWorker) -> Study:
    return Study(clinic)


def refused(attempt: Callable[[], Any]) -> str:
    with pytest.raises(hc.HousecallError) as caught:
        attempt()
    return str(caught.value).partition("\n")[0]


def kinds(owner: Owner) -> list[str]:
    return [sealed.entry.kind for sealed in owner.ledger.entries()]


# -- with pointers ----------------------------------------------------------------------------------------------


def test_a_program_is_submitted_approved_run_and_what_it_makes_released(study: Study) -> None:
    owner = study.clinic.owner
    answer = study.submit(runs=3)
    assert answer.status == "pending"
    (request,) = owner.pending()
    assert (request.kind, request.digest, request.runs) == ("program", answer.digest, 3)
    owner.approve(request.id, uses=3, release=True)
    assert answer.wait().status == "approved"
    losses = [study.run() for _ in range(3)]
    assert float(losses[2].get()) < float(losses[0].get())
    study.model.get()
    for name, value in study.expected(3).state_dict().items():
        assert torch.equal(study.model.state_dict()[name], value), name
    assert "plans.ask" in refused(lambda: Study(study.clinic).run().get())  # the fourth run
    runs = [sealed.entry for sealed in owner.ledger.entries() if answer.digest in sealed.entry.program]
    assert [entry.kind for entry in runs] == ["request", "approval", "run", "run", "run", "release"] + [
        "release"
    ] * 2 + ["refusal"]
    left = [entry for entry in runs if entry.kind == "release"]
    assert [re.search(r"\d+ tensors?, .*", entry.decision).group() for entry in left] == [  # type: ignore[union-attr]
        "1 tensor, 1 value",
        "1 tensor, 1 value",
        "2 tensors, 4 values",
    ]
    assert all(request.id in entry.program for entry in left)


def test_the_owner_reads_whose_columns_go_where_and_what_comes_of_it(study: Study) -> None:
    study.submit()
    (request,) = study.clinic.owner.pending()
    text = request.program
    assert request.digest in text
    assert study.step.digest in text
    assert "heart.x: float32[20, 3]: column 'x' of data set 'heart'" in text
    assert "brought/model.weight: float32[1, 3], updated: brought" in text
    assert "brought/model.weight (updated): float32[1, 3]: of heart" in text
    assert "together 5 values that derive from owned data" in text
    assert "index_select.default(heart.x, 0, brought/rows)" in text


def test_without_an_approval_nothing_of_it_may_be_touched(study: Study) -> None:
    attempts: dict[str, Callable[[], Any]] = {
        "a call": lambda: (study.x + 1).get(),
        "a view": lambda: study.x.t().get(),
        "a copy": lambda: study.x.copy().get(),
        "a write into hers": lambda: torch.zeros(20, 3).send(study.clinic).copy_(study.x).get(),
        "a batch": lambda: study.x[:4].get(),
        "an operator without results": lambda: torch._foreach_add_([torch.zeros(20, 3).send(study.clinic)], [study.x]),
        "a mean": lambda: study.x.mean().item(),
    }
    texts = set()
    for name, attempt in attempts.items():
        text = refused(lambda attempt=attempt: (attempt(), study.clinic.session.wait()))  # type: ignore[misc]
        assert "rule use.interactive" in text, name
        texts.add(text.partition("PolicyError: ")[2])
    assert len(texts) == 1
    assert "plans.ask" in refused(lambda: study.run().get())
    assert "release.approvals" in refused(study.x.get)
    torch.ones(3).send(study.clinic).add(1).get()  # what is hers she works on as ever


def test_running_alone_lets_nothing_out(study: Study) -> None:
    answer = study.submit()
    study.clinic.owner.approve(answer.id)
    loss = study.run()
    assert "release.approvals" in refused(loss.get)
    assert "release.approvals" in refused(study.model.get)
    assert "use.interactive" in refused(lambda: (loss + 1).get())
    assert "release.approvals" in refused(loss.get)
    request = loss.request("the loss as well")
    study.clinic.owner.approve(request.id)
    assert torch.is_tensor(loss.get())


def test_a_denial_an_end_and_a_withdrawal(study: Study) -> None:
    owner = study.clinic.owner
    answer = study.submit()
    owner.deny(answer.id, "not this one")
    with pytest.raises(hc.PolicyError, match="not this one"):
        answer.wait()
    assert "plans.ask" in refused(lambda: study.run().get())
    other = study.submit(runs=2)
    owner.approve(other.id, uses=5, release=True)
    loss = study.run()
    study.clinic.session.wait()
    owner.deny(other.id, "I was mistaken")
    assert "release.approvals" in refused(loss.get)  # what had not left stays
    assert "plans.ask" in refused(lambda: study.run().get())
    third = study.submit(runs=3)
    owner.approve(third.id, uses=5, release=True)
    owner.gate._now = lambda: datetime.now(UTC) + timedelta(days=2)
    assert "plans.ask" in refused(lambda: study.run().get())


def test_a_policy_that_lists_the_digest_asks_nobody(study: Study) -> None:
    asked = study.submit()
    listed = Policy(use=ASKED.use, plans=Plans(digests=(asked.digest,)), release=Release(exact=("me",)))
    study.clinic.owner.policies.register("heart", listed)
    answer = study.submit()
    assert (answer.id, answer.status) == ("", "approved")
    study.run()
    study.run()
    study.model.get()
    assert torch.equal(study.model.weight, study.expected(2).weight)
    other = hc.record(lambda x: x.sum(), X)
    assert "plans.digests" in refused(lambda: other(study.x).get())
    assert "asking is of no use" in refused(lambda: other.submit(study.x, reason="and this?"))


def test_an_approved_program_cannot_be_pointed_elsewhere(clinic: hc.VirtualWorker) -> None:
    clinic.add("heart", x=X.clone(), y=Y.clone(), secret=X.clone(), policy=ASKED, replace=True)
    clinic.add("lungs", x=X.clone(), policy=ASKED)
    heart, lungs = clinic.dataset("heart"), clinic.dataset("lungs")
    total = hc.record(lambda x: x.sum(0), X)
    answer = total.submit(heart.column("x"), reason="the sum")
    clinic.owner.approve(answer.id, uses=100, release=True)
    assert torch.equal(total(heart.column("x")).get(), X.sum(0))
    assert "plans.ask" in refused(lambda: total(heart.column("secret")).get())
    assert "plans.ask" in refused(lambda: total(lungs.column("x")).get())
    doubled = hc.record(lambda x: x * 2, X)
    clinic.owner.approve(doubled.submit(heart.column("x"), reason="twice").id)
    assert "plans.ask" in refused(lambda: total(doubled(heart.column("x"))).get())  # what another made


def test_a_program_may_go_on_from_its_own_runs_and_what_it_makes_leaves_if_all_were_approved_so(study: Study) -> None:
    owner = study.clinic.owner
    owner.approve(study.submit().id)
    study.run()  # approved, without release
    second = study.submit()
    owner.approve(second.id, uses=2, release=True)
    loss = study.run()
    assert "release.approvals" in refused(loss.get)
    fresh = Study(study.clinic)
    assert fresh.step.digest == study.step.digest
    fresh.run().get()


def test_a_view_of_what_another_program_made_takes_nothing_along(clinic: hc.VirtualWorker) -> None:
    """A label is of a storage; that something may leave is not."""
    x = clinic.dataset("heart").column("x")
    doubled, first = hc.record(lambda x: x * 2, X), hc.record(lambda x: x[0], X)
    owner = clinic.owner
    owner.approve(doubled.submit(x, reason="not to leave").id)
    whole = doubled(x)
    owner.approve(first.submit(whole, reason="one row, to leave").id, release=True)
    row = first(whole)
    assert "release.approvals" in refused(whole.get)
    assert torch.equal(row.get(), 2 * X[0])


def test_reading_what_was_made_does_not_make_it_anew(clinic: hc.VirtualWorker) -> None:
    x = clinic.dataset("heart").column("x")
    doubled, count = hc.record(lambda x: x * 2, X), hc.record(lambda x: x.sum() * 0, X)
    owner = clinic.owner
    owner.approve(doubled.submit(x, reason="not to leave").id)
    whole = doubled(x)
    owner.approve(count.submit(whole, reason="nothing, to leave").id, release=True)
    assert count(whole).get() == 0
    assert "release.approvals" in refused(whole.get)


def test_there_is_nothing_to_ask_where_pointers_are_allowed(clinic: hc.VirtualWorker) -> None:
    clinic.add("open", x=X, policy=Policy(use=Use(interactive=("me",)), release=Release(approvals=True)))
    total = hc.record(lambda x: x.sum(), X)
    x = clinic.dataset("open").column("x")
    assert "nothing to ask" in refused(lambda: total.submit(x, reason="the sum"))
    assert "release.approvals" in refused(lambda: total(x).get())


def test_pointers_to_one_and_programs_on_another(clinic: hc.VirtualWorker) -> None:
    """What derives from both is closed as the second is."""
    clinic.add("open", x=X.clone(), policy=Policy(use=Use(interactive=("me",)), release=Release(exact=("me",))))
    mine, theirs = clinic.dataset("open").column("x") + 1, clinic.dataset("heart").column("x")
    joined = hc.record(lambda a, b: a + b, X, X)
    clinic.owner.approve(joined.submit(mine, theirs, reason="both").id, release=True)
    both = joined(mine, theirs)
    assert "use.interactive" in refused(lambda: (both + 1).get())
    assert "release.approvals" in refused(both.get)  # the approval is of heart alone
    assert torch.equal(mine.get(), X + 1)


def test_submitting_is_refused_by_name() -> None:
    clinic = hc.VirtualWorker(id="clinic")
    clinic.add("heart", x=X.clone(), policy=ASKED)
    x = clinic.dataset("heart").column("x")
    total = hc.record(lambda x: x.sum(), X)
    assert "wants to read why" in refused(lambda: total.submit(x, reason=" "))
    assert "once or more" in refused(lambda: total.submit(x, reason="why", runs=0))
    assert "none of the tensors is at a worker" in refused(lambda: total.submit(X, reason="why"))
    assert "there is nothing to ask" in refused(lambda: total.submit(X.send(clinic), reason="why"))
    named = hc.record(lambda parts: parts["x) {"] + 1, {"x) {": X})
    assert "could misread that name" in refused(lambda: named.submit({"x) {": x}, reason="why"))


def test_what_recordings_call_their_inputs_and_outputs_can_be_submitted(clinic: hc.VirtualWorker) -> None:
    model, x = nn.Sequential(nn.Linear(3, 2)), clinic.dataset("heart").column("x")
    optimizer = torch.optim.Adam(model.parameters())

    def train(model: nn.Module, parts: Any, *rows: Any) -> Any:
        loss = model(parts["x"][0].index_select(0, rows[0]) * parts[1]).mean()
        loss.backward()
        optimizer.step()
        return loss.detach(), parts["x"][0].sum()

    ones = torch.ones(3).send(clinic)
    trained = hc.record(train, model, {"x": [X], 1: torch.ones(3)}, ROWS)
    model.send(clinic)
    trained.submit(model, {"x": [x], 1: ones}, ROWS.send(clinic), reason="names")
    text = clinic.owner.pending()[0].program
    for name in ("brought/model.0.weight", "brought/parts[1]", "brought/rows[0]", "result[0]", "model.0.weight.grad"):
        assert name in text
    assert hc.record(lambda parts: parts["x"][0] + 1, {"x": [X]}).program.inputs[0].name == "parts.x[0]"


@pytest.mark.parametrize(
    "name",
    [
        "0.0",
        "x y",
        "\u0445",
        "rows\ua789\u2800float32",
        "",
        "x" * 101,
        "a..b",
        "-1",
        "x\n",
        "x[a]",
        ".x",
        "%9",
        "x\u0661",
    ],
)
@pytest.mark.parametrize("kind", ["inputs", "outputs", "numbers"])
def test_names_that_an_owner_could_misread_are_refused(kind: str, name: str) -> None:
    world = World()
    named = {"inputs": "a", "outputs": "out", "numbers": "by", kind: name}
    made = hc.Program(
        (Input(named["inputs"], 1, MATRIX),),
        (Call("mul.Tensor", (Ref(1), Ref(9)), {}, (10,)),),
        ((named["outputs"], 10),),
        ((named["numbers"], 9),),
    )
    reason = world.frame(Define(made), Submit(made.digest, (1,), "why")).failures[0].reason
    assert "could misread that name" in reason


def test_a_number_prints_as_one_and_as_nothing_else() -> None:
    world = World()
    made = hc.Program(
        (Input("a", 1, MATRIX), Input("b", 2, MATRIX)),
        (Call("mul.Tensor", (Ref(1), Ref(9)), {}, (10,)), Call("add.Tensor", (Ref(10), Ref(2)), {}, (11,))),
        (("out", 11),),
        (("heart.x", 9),),
    )
    world.frame(Put(5, share(torch.zeros(20, 3))))
    world.approved(made, (1, 5))
    text = world.owner.requests.all()[-1].program
    assert "  number/heart.x: a number, given anew with each run" in text
    assert "number/heart.x: number) {" in text
    assert "mul.Tensor(heart.x, number/heart.x)" in text


def test_columns_that_print_alike_are_refused_and_none_prints_as_a_constant() -> None:
    world = World()
    for name, column in (("a", "b.c"), ("a.b", "c"), ("1", "5")):
        world.worker.catalogue.register(name, {column: X.clone()})
        world.owner.policies.register(name, ASKED)
    world.frame(Load("a", (3,)), Load("a.b", (4,)), Load("1", (6,)))
    both = program("add.Tensor", count=2)
    assert "two inputs print as 'a.b.c'" in world.why(Define(both), Submit(both.digest, (3, 4), "why"))
    world.approved(both, (3, 6))
    assert "add.Tensor(a.b.c, data/1.5)" in world.owner.requests.all()[-1].program


def test_an_owner_reads_that_random_numbers_are_not_hers() -> None:
    world = World()
    noise = program("rand_like.default")
    world.approved(noise, (1,))
    world.approved(SUM, (1,))
    said = "(random numbers: of a seed that whoever submits this chooses)"
    assert [said in request.program for request in world.owner.requests.all()] == [True, False]


def test_a_program_of_a_file_is_submitted_too(clinic: hc.VirtualWorker, tmp_path: Path) -> None:
    hc.record(lambda x, scale: (x * scale).sum(0), X, torch.ones(3)).save(tmp_path / "sum.program")
    loaded = hc.load_program(tmp_path / "sum.program")
    given = {"x": clinic.dataset("heart").column("x"), "scale": torch.full((3,), 2.0).send(clinic)}
    answer = hc.submit_program(loaded, given, reason="a file")
    clinic.owner.approve(answer.id, release=True)
    (result,) = hc.run_program(loaded, given).values()
    assert torch.allclose(result.get(), 2 * X.sum(0))
    assert "missing ['x']" in refused(lambda: hc.submit_program(loaded, {"scale": given["scale"]}, reason="a file"))


def test_a_data_set_is_an_argument_and_so_is_its_mock(clinic: hc.VirtualWorker) -> None:
    clinic.add("lungs", x=X.clone(), y=Y.clone(), mock=hc.Fakes(records=7), policy=ASKED)
    clinic.add("bones", x=X.clone(), mock=hc.Fakes(records=7), policy=ASKED)
    lungs, bones = clinic.dataset("lungs"), clinic.dataset("bones")

    def mean(records: Any, scale: torch.Tensor) -> torch.Tensor:
        x, y = records
        return (x * y.unsqueeze(1)).mean(0) * scale

    scale = torch.ones(3)
    step = hc.record(mean, lungs.mock(), scale)
    assert mean(lungs.mock()[:], scale).shape == (3,)  # the same function, at home
    remote = scale.send(clinic)
    clinic.owner.approve(step.submit(lungs, remote, reason="a mean").id, release=True)
    assert torch.allclose(step(lungs, remote).get(), (X * Y.unsqueeze(1)).mean(0))
    total = hc.record(lambda x: x.sum(0), bones.mock())
    clinic.owner.approve(total.submit(x=bones, reason="a sum").id, release=True)
    assert torch.equal(total(x=bones).get(), X.sum(0))
    assert "at one worker" in refused(lambda: total(bones + lungs))


def test_a_wait_for_an_answer(study: Study) -> None:
    answer = study.submit()
    with pytest.raises(TimeoutError):
        answer.wait(timeout=0.01, every=0.001)
    threading.Timer(0.05, lambda: study.clinic.owner.approve(answer.id)).start()
    assert answer.wait(every=0.01).status == "approved"


# -- with frames ------------------------------------------------------------------------------------------------


class World:
    """One session's door at a worker with an owner's data: %1 is `x`, %2 is `secret`, of one type."""

    def __init__(self, policy: Policy = ASKED) -> None:
        self.owner, self.worker = Owner(), Worker("clinic")
        self.worker.gate = self.owner.gate
        self.worker.catalogue.register("heart", {"x": X.clone(), "secret": 2 * X})
        self.owner.policies.register("heart", policy)
        self.number = 0
        self.door = self.opened()

    def opened(self) -> WorkerSession:
        door = self.worker.open("me")
        self.frame(Load("heart", (1, 2)), door=door)
        return door

    def frame(self, *messages: Any, door: WorkerSession | None = None) -> Any:
        self.number += 1
        return (door or self.door).handle(Frame(self.number, messages))

    def why(self, *messages: Any, door: WorkerSession | None = None) -> str:
        """The one failure that these messages end in."""
        (failure,) = self.frame(*messages, door=door).failures
        self.door.halt.cause = None
        return failure.reason

    def approved(self, program: hc.Program, ids: tuple[int, ...], **options: Any) -> str:
        (said,) = self.frame(Define(program), Submit(program.digest, ids, "why")).results
        assert isinstance(said, Requested)
        self.owner.approve(said.request, **options)
        return said.request

    def taken(self, ref: int) -> torch.Tensor | None:
        (value,) = self.frame(Fetch((ref,))).results[0].arrays
        return value.data if isinstance(value, Array) else None


def program(op: str = "sum.default", *args: Any, shape: tuple[int, ...] = (20, 3), count: int = 1) -> hc.Program:
    type_ = TensorType("float32", shape, (shape[1], 1) if len(shape) == 2 else (1,))
    inputs = tuple(Input(f"a{at}", at, type_) for at in range(1, count + 1))
    refs = tuple(Ref(at) for at in range(1, count + 1))
    return hc.Program(inputs, (Call(op, (*refs, *args), {}, (10,)),), (("out", 10),))


SUM = program()


def test_an_input_of_another_type_is_refused_before_a_use_is_lost() -> None:
    """The owner read that twenty rows are summed; it is not to be one."""
    world = World()
    taken = program("index_select.default", 0, Ref(3))
    rows = hc.Program((*taken.inputs, Input("rows", 3, TensorType("int64", (8,), (1,)))), taken.calls, taken.outputs)
    world.frame(Put(5, share(ROWS)), Put(6, share(torch.tensor([3]))))
    world.approved(rows, (1, 5), release=True)
    assert "expected a int64[8]" in world.why(Run(rows.digest, (1, 6), (20,)))
    assert "no value of this session" in world.why(Run(rows.digest, (1, 99), (21,)))
    assert "bound already" in world.why(Run(rows.digest, (1, 5), (5,)))
    assert "2 inputs" in world.why(Run(rows.digest, (1,), (22,)))
    world.frame(Run(rows.digest, (1, 5), (23,)))
    assert torch.equal(world.taken(23), X[:8])  # type: ignore[arg-type]


def test_an_id_that_was_a_column_is_none_when_it_is_bound_anew() -> None:
    world = World()
    both = program("add.Tensor", count=2)
    world.approved(both, (1, 1), release=True)
    world.frame(Drop((1,)), Put(1, share(torch.zeros(20, 3))))
    assert "plans.ask" in world.why(Run(both.digest, (1, 2), (20,)))
    world.frame(Clear(), Load("heart", (2, 1)))  # the other way round
    assert "plans.ask" in world.why(Run(both.digest, (1, 1), (21,)))
    world.frame(Clear(), Load("heart", (5, 6)), Run(both.digest, (5, 5), (22,)))
    assert torch.equal(world.taken(22), 2 * X)  # type: ignore[arg-type]


def test_a_view_of_a_column_under_its_id_is_not_the_column() -> None:
    world = World()
    world.frame(Load("heart", (3, 4)))  # so the storage stays lent
    same = program("view.default", Items((20, 3)))  # a view of the same type
    world.approved(same, (1,))
    world.approved(SUM, (1,), release=True)
    world.frame(Run(same.digest, (1,), (20,)), Drop((1,)), Run(same.digest, (3,), (1,)))
    assert "plans.ask" in world.why(Run(SUM.digest, (20,), (21,)))


def test_an_approval_holds_in_every_session_of_its_principal_and_in_no_others() -> None:
    world = World()
    world.approved(SUM, (1,), uses=2, release=True)
    mine, other = world.opened(), world.worker.open("eve")
    world.frame(Define(SUM), Run(SUM.digest, (1,), (20,)), door=mine)
    assert mine.store.tensors().get(20) is not None
    world.owner.policies.register("heart", Policy(use=Use(plans=("me", "eve")), plans=Plans(ask=True)))
    world.frame(Load("heart", (1, 2)), Define(SUM), door=other)
    assert "plans.ask" in world.why(Run(SUM.digest, (1,), (20,)), door=other)


def test_of_runs_at_once_as_many_happen_as_were_approved() -> None:
    world = World()
    world.approved(SUM, (1,), uses=3)
    doors = [world.opened() for _ in range(8)]
    for door in doors:
        world.frame(Define(SUM), door=door)

    def run(door: WorkerSession) -> None:
        door.handle(Frame(1, (Run(SUM.digest, (1,), (20,)),)))

    at_once(*[partial(run, door) for door in doors])
    assert sum(20 in door.store.tensors() for door in doors) == 3


def test_a_request_whose_text_was_edited_is_approved_for_nothing() -> None:
    """Whoever can write the folder shows the owner another program."""
    world = World()
    (said,) = world.frame(Define(SUM), Submit(SUM.digest, (1,), "why")).results
    shelf, name = world.owner.requests._shelf, f"requests/{said.request}.json"
    shelf.write(name, shelf.read(name).replace(b"sum.default", b"zeros_like."))
    world.owner.approve(said.request, release=True)
    assert "plans.ask" in world.why(Run(SUM.digest, (1,), (20,)))


def test_a_call_that_fails_on_private_data_in_a_run_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[str] = []
    monkeypatch.setattr(private, "note_failure", lambda call, label, error: noted.append(call.op))
    world = World()
    square = program("slice.Tensor", 0, 0, 3)
    solved = hc.Program(
        square.inputs,
        (*square.calls, Call("linalg_cholesky_ex.default", (Ref(10),), {"check_errors": True}, (11, 12))),
        (("l", 11),),
    )
    world.approved(solved, (1,), release=True)
    reply = world.frame(Run(solved.digest, (1,), (20,)))
    assert reply.failures == ()
    assert world.taken(20) is None


def test_a_session_that_has_not_heard_of_a_failure_loses_no_use() -> None:
    world = World()
    world.approved(SUM, (1,))
    world.frame(Call("no_such.default", (), {}, (30,)), Run(SUM.digest, (1,), (20,)))
    world.door.halt.cause = None
    world.frame(Run(SUM.digest, (1,), (21,)))
    assert 21 in world.door.store.tensors()


def test_a_use_is_counted_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.approved(SUM, (1,))

    class Killed(BaseException):
        """As by a signal."""

    def killed(*args: Any) -> Any:
        raise Killed

    monkeypatch.setattr(world.door.plans, "run", killed)
    with pytest.raises(Killed):
        world.frame(Run(SUM.digest, (1,), (20,)))
    monkeypatch.undo()
    assert "plans.ask" in world.why(Run(SUM.digest, (1,), (21,)))
    assert kinds(world.owner)[-2:] == ["run", "refusal"]


def test_a_session_without_such_data_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(Policy.open_to("me"))
    assert world.door.meter is not None
    assert world.door.meter.may_use is None
    world.frame(Define(SUM), Run(SUM.digest, (1,), (20,)))
    assert world.taken(20) is not None


def test_a_policy_that_is_loosened_opens_at_the_next_load() -> None:
    world = World()
    assert "use.interactive" in world.why(Call("neg.default", (Ref(1),), {}, (20,)))
    world.owner.policies.register("heart", Policy.open_to("me"))
    world.frame(Load("heart", (3, 4)), Call("neg.default", (Ref(1),), {}, (21,)))
    assert torch.equal(world.taken(21), -X)  # type: ignore[arg-type]
    world.owner.policies.register("heart", ASKED)
    world.frame(Load("heart", (5, 6)))
    assert "use.interactive" in world.why(Call("neg.default", (Ref(21),), {}, (22,)))


# -- what comes along ---------------------------------------------------------------------------------------------


def leaf(clinic: hc.VirtualWorker) -> Any:
    """A leaf that derives from the data, and its gradient, which does as well."""
    clinic.add("open", x=X, policy=Policy(use=Use(interactive=("me",)), release=Release(approvals=True)))
    x = clinic.dataset("open").column("x")
    made = x.mean(0).detach().requires_grad_()
    (made * x).sum().backward()
    return made


def test_a_gradient_that_may_not_leave_wastes_no_approval_of_its_leaf(clinic: hc.VirtualWorker) -> None:
    made = leaf(clinic)
    clinic.owner.approve(made.request("the mean").id)
    value = made.get()
    assert torch.equal(value, X.mean(0))
    assert isinstance(value.grad, hc.PointerTensor)
    assert "release.approvals" in refused(value.grad.get)


def test_an_approval_of_a_gradient_is_not_used_up_where_its_leaf_is_refused(clinic: hc.VirtualWorker) -> None:
    made = leaf(clinic)
    clinic.owner.approve(made.grad.request("the gradient alone").id)
    assert "release.approvals" in refused(made.get)
    assert torch.allclose(made.grad.get(), X.sum(0))


def test_gradients_that_come_late_come_as_far_as_they_may(clinic: hc.VirtualWorker) -> None:
    clinic.add("open", x=X, y=Y, policy=Policy(use=Use(interactive=("me",)), release=Release(approvals=True)))
    heart = clinic.dataset("open")
    model = nn.Linear(3, 1).send(clinic)
    F.mse_loss(model(heart.column("x")).squeeze(1), heart.column("y")).backward()
    clinic.owner.approve(model.bias.grad.request("the bias's alone").id)
    model.get()  # the parameters are hers as they were
    assert torch.is_tensor(model.bias.grad + 0)
    assert "release.approvals" in refused(lambda: model.weight.grad + 0)
    assert torch.is_tensor(model.bias.grad + 0)


# -- which value an input is ------------------------------------------------------------------------------------

MATRIX = TensorType("float32", (20, 3), (3, 1))


def scaled(*outputs: tuple[str, float], name: str = "a1", updates: bool = False) -> hc.Program:
    """`name`, once for each output, by a number."""
    calls = [Call("mul.Tensor", (Ref(1), by), {}, (10 + at,)) for at, (_, by) in enumerate(outputs)]
    writes = [Call("add_.Tensor", (Ref(1), 0.0), {}, ())] if updates else []
    returned = tuple((given, 10 + at) for at, (given, _) in enumerate(outputs))
    return hc.Program((Input(name, 1, MATRIX, updates),), (*calls, *writes), returned)


def test_an_approval_of_one_output_is_none_of_another_of_its_type() -> None:
    world = World()
    both, taken = scaled(("zeros", 0.0), ("raw", 1.0)), scaled(("out", 1.0))
    world.approved(both, (1,))
    world.frame(Run(both.digest, (1,), (20, 21)))
    world.approved(taken, (20,), release=True)
    assert " as 'zeros'" in world.owner.requests.all()[-1].program
    assert "plans.ask" in world.why(Run(taken.digest, (21,), (22,)))
    world.frame(Run(taken.digest, (20,), (23,)))
    assert torch.equal(world.taken(23), torch.zeros(20, 3))  # type: ignore[arg-type]


def test_in_the_place_of_what_another_made_goes_only_what_bears_its_name() -> None:
    world = World()
    first, step = scaled(("weight", 1.0)), scaled(("raw", 5.0), name="weight", updates=True)
    world.approved(first, (1,), release=True)
    world.frame(Run(first.digest, (1,), (20,)))
    world.approved(step, (20,), uses=2, release=True)
    world.frame(Run(step.digest, (20,), (21,)))
    assert "plans.ask" in world.why(Run(step.digest, (21,), (22,)))  # its own, by another name
    world.frame(Run(step.digest, (20,), (23,)))  # a step that goes on from its own results
    assert torch.equal(world.taken(23), 5 * X)  # type: ignore[arg-type]


def test_what_was_made_with_pointers_is_one_value_and_what_nobody_knows_is_none() -> None:
    world = World()
    world.worker.catalogue.register("open", {"x": X.clone()})
    world.owner.policies.register("open", Policy.open_to("me"))
    both = program("add.Tensor", count=2)
    neg = (Call("neg.default", (Ref(3),), {}, (4,)), Call("exp.default", (Ref(3),), {}, (5,)))
    world.frame(Load("open", (3,)), *neg)
    world.approved(both, (1, 4), uses=5)
    assert "this one value" in world.owner.requests.all()[-1].program
    world.frame(Run(both.digest, (1, 4), (20,)))
    assert 20 in world.door.store
    assert "plans.ask" in world.why(Run(both.digest, (1, 5), (21,)))
    world.frame(Call("add_.Tensor", (Ref(4), 1.0), {}, ()))
    assert "plans.ask" in world.why(Run(both.digest, (1, 4), (22,)))
    world.approved(SUM, (20,), uses=5, release=True)
    view = program("view.default", Items((20, 3)))
    world.approved(view, (20,))
    updated = scaled(("out", 1.0), updates=True)
    world.frame(Run(view.digest, (20,), (24,)))
    world.approved(updated, (24,))
    world.frame(Run(updated.digest, (24,), (25,)))  # what %20 shares with it was written to
    assert "no longer what an accepted run made" in world.why(Run(SUM.digest, (20,), (26,)))


def test_what_an_approval_that_was_withdrawn_has_made_does_not_leave_through_another_program() -> None:
    world = World()
    first, second = scaled(("o", 1.0)), scaled(("out", 2.0))
    held = world.approved(first, (1,), uses=2)
    world.frame(Run(first.digest, (1,), (20,)))
    world.approved(second, (20,), uses=9, release=True)
    world.frame(Run(second.digest, (20,), (21,)))
    assert torch.equal(world.taken(21), 2 * X)  # type: ignore[arg-type]
    world.owner.deny(held, "a mistake")
    world.frame(Run(second.digest, (20,), (22,)))
    assert world.taken(21) is None
    assert world.taken(22) is None


def state(seed: int) -> Any:
    return share(torch.Generator().manual_seed(seed).get_state())


def test_random_numbers_that_private_data_has_moved_are_no_input_of_a_program() -> None:
    world = World(msgspec.structs.replace(ASKED, use=Use(plans=("me",))))
    counted, noise = program("poisson.default"), program("rand_like.default")
    world.worker.catalogue.register("heart", {"x": X.abs(), "secret": X.abs()}, replace=True)
    world.frame(Clear(), Load("heart", (1, 2)), Put(5, share(torch.zeros(20, 3))), Seed(state(1)))
    world.approved(counted, (1,), uses=9)
    world.approved(noise, (1,), uses=9, release=True)
    world.frame(Run(noise.digest, (1,), (20,)), Run(noise.digest, (1,), (21,)))  # as much as the shape says
    first = torch.rand(20, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(world.taken(20), first)  # type: ignore[arg-type]
    assert world.taken(21) is not None
    for _ in range(2):  # call by call, and in steps
        world.frame(Seed(state(1)))
        ids = iter(range(100 + 10 * world.number, 10**6))
        world.frame(Run(counted.digest, (1,), (next(ids),)))
        assert "torch.manual_seed" in world.why(Run(noise.digest, (1,), (next(ids),)))
        assert "torch.manual_seed" in world.why(Run(noise.digest, (5,), (next(ids),)))
        assert "torch.manual_seed" in world.why(Run(counted.digest, (1,), (next(ids),)))
        assert "torch.manual_seed" in world.why(Submit(noise.digest, (1,), "why"))
    world.frame(Seed(state(1)), Run(noise.digest, (1,), (30,)))
    assert torch.equal(world.taken(30), first)  # type: ignore[arg-type]


def test_a_value_that_was_drawn_after_private_data_moved_the_generator_is_not_asked_for() -> None:
    world = World(Policy(use=Use(interactive=("me",)), release=Release(approvals=True)))
    world.worker.catalogue.register("heart", {"x": X.abs(), "secret": X.abs()}, replace=True)
    poisson, noise = program("poisson.default"), program("rand_like.default")
    world.frame(Clear(), Load("heart", (1, 2)), Seed(state(1)), Put(5, share(torch.zeros(20, 3))))
    world.frame(Call("poisson.default", (Ref(1),), {}, (10,)), Call("sum.default", (Ref(1),), {}, (13,)))
    assert world.frame(Request((10,), "the first of all")).results
    world.frame(Call("rand_like.default", (Ref(5),), {}, (11,)), Call("sum.default", (Ref(11),), {}, (12,)))
    assert "torch.manual_seed" in world.why(Request((12,), "what came after it"))
    assert world.frame(Request((13,), "nothing of it")).results
    world.frame(Clear(), Load("heart", (1, 2)), Seed(state(1)), Put(5, share(torch.zeros(20, 3))))
    world.frame(Call("poisson.default", (Ref(1),), {}, (10,)), Seed(state(1)))
    world.frame(Define(noise), Run(noise.digest, (1,), (14,)))
    assert world.frame(Request((14,), "after a new seed")).results
    world.frame(Define(poisson), Run(poisson.digest, (1,), (15,)), Seed(state(2)), Run(poisson.digest, (1,), (16,)))
    assert world.frame(Request((16,), "in steps")).results
    world.frame(Run(noise.digest, (5,), (17,)))
    assert "torch.manual_seed" in world.why(Request((17,), "in steps, and after it"))


def test_a_program_that_draws_is_submitted_after_a_seed(clinic: hc.VirtualWorker) -> None:
    clinic.add("bones", x=X.abs(), policy=ASKED)
    x = clinic.dataset("bones").column("x")
    counts = hc.record(lambda x: torch.poisson(x), X)
    clinic.owner.approve(counts.submit(x, reason="counts").id, uses=3, release=True)
    torch.manual_seed(3)
    first = counts(x)
    assert "torch.manual_seed" in refused(lambda: counts(x).get())
    torch.manual_seed(3)
    counts.submit(x, reason="counts, after a seed")
    second = counts(x).get()
    assert torch.equal(first.get(), second)
    torch.manual_seed(3)
    assert torch.equal(second, torch.poisson(X.abs()))


def test_pointers_that_are_withdrawn_end_with_the_next_frame_and_open_at_the_next_load() -> None:
    world = World(Policy.open_to("me"))
    world.frame(Call("neg.default", (Ref(1),), {}, (20,)), Define(SUM))
    assert torch.equal(world.taken(20), -X)  # type: ignore[arg-type]
    world.owner.policies.register("heart", msgspec.structs.replace(Policy.open_to("me"), version=2))
    world.frame(Call("neg.default", (Ref(1),), {}, (21,)))
    assert 21 in world.door.store.tensors()
    world.owner.policies.register("heart", ASKED)
    for ref in (1, 20):
        assert "use.interactive" in world.why(Call("neg.default", (Ref(ref),), {}, (30 + ref,)))
    assert "plans.ask" in world.why(Run(SUM.digest, (1,), (41,)))
    world.approved(SUM, (1,))
    world.owner.policies.forget("heart")
    assert "heart" in world.why(Run(SUM.digest, (1,), (42,)))
    world.owner.policies.register("heart", Policy.open_to("me"))
    world.frame(
        Load("heart", (3, 4)), Call("neg.default", (Ref(3),), {}, (33,)), Call("neg.default", (Ref(1),), {}, (34,))
    )
    assert {33, 34} <= world.door.store.tensors().keys()


def test_a_session_that_loads_again_and_again_is_one_line() -> None:
    world = World()
    for number in range(5):
        assert world.frame(Load("heart", (1, 2))).failures
        world.door.halt.cause = None
        assert world.frame(Load("heart", (7, 7))).failures
        world.door.halt.cause = None
        assert not world.frame(Load("heart", (100 + number, 200 + number))).failures
    assert kinds(world.owner).count("run") == 1
    world.owner.policies.register("heart", Policy.open_to("me"))
    world.frame(Load("heart", (3, 4)))
    assert kinds(world.owner).count("run") == 2
    world.worker.catalogue.register("heart", {"x": X, "secret": X}, replace=True)
    world.frame(Clear(), Load("heart", (3, 4)))
    assert kinds(world.owner).count("run") == 3
    world.opened()
    assert kinds(world.owner).count("run") == 4


# -- refusals without end -----------------------------------------------------------------------------------------


def refusals(owner: Owner) -> list[Any]:
    return [sealed.entry for sealed in owner.ledger.entries() if sealed.entry.kind == "refusal"]


def test_refusals_that_say_nothing_hide_none_that_matter() -> None:
    world = World()
    for number in range(30):
        world.frame(Load(f"nothing{number}", (1000 + number,)))
    for _ in range(500):
        world.frame(Fetch((1, 2)))
    assert [entry.data_sets for entry in refusals(world.owner)] == [(f"nothing{at}",) for at in range(20)] + [
        ("heart",)
    ]
    world.door.close()
    (last,) = refusals(world.owner)[21:]
    assert last.data_sets == ("heart",)
    assert last.decision == "509 refusals more were counted: 499 of heart"


def test_what_was_only_counted_is_written_when_the_minute_is_over_and_once_a_minute_by_sessions_that_end() -> None:
    world = World()
    now = datetime.now(UTC)
    world.owner.gate._now = lambda: now
    for _ in range(30):
        world.frame(Fetch((1,)))
    assert len(refusals(world.owner)) == 20
    for _ in range(5):
        door = world.opened()
        world.frame(Fetch((1,)), door=door)
        door.close()
    assert len(refusals(world.owner)) == 21  # what the first to end has told
    now += timedelta(minutes=1)
    world.owner.gate.notice()
    assert [entry.decision for entry in refusals(world.owner)[20:]] == [
        "11 refusals more were counted: 11 of heart",
        "4 refusals more were counted: 4 of heart",
    ]
    world.frame(Fetch((1,)))
    assert "release.approvals" in refusals(world.owner)[-1].decision


def test_of_refusals_at_once_none_is_lost() -> None:
    world = World()
    doors = [world.opened() for _ in range(8)]

    def ask(door: WorkerSession) -> None:
        for _ in range(25):
            door.handle(Frame(1, (Fetch((1,)),)))

    at_once(*[partial(ask, door) for door in doors])
    world.owner.gate.settle(everything=True)
    found = refusals(world.owner)
    assert len(found) == 21
    assert found[-1].decision == "180 refusals more were counted: 180 of heart"


# -- in a folder ------------------------------------------------------------------------------------------------


def test_what_an_owner_answers_elsewhere_is_in_the_ledger_once(tmp_path: Path) -> None:
    """She answers in a process of her own; the worker, the only writer of the ledger, finds it."""
    key = OwnerKey.create(tmp_path)
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "heart.toml").write_text(ASKED.text())
    sign(tmp_path, draft(tmp_path, "heart", key.public), key)
    world = World()
    gate = world.worker.gate = gate_of(tmp_path)
    assert gate.ledger is not None
    world.door = world.opened()
    (said,) = world.frame(Define(SUM), Submit(SUM.digest, (1,), "why")).results
    (other,) = world.frame(Submit(SUM.digest, (2,), "why")).results
    hers = Requests(tmp_path, key.public)
    hers.approve(said.request, key, uses=2, release=True)
    hers.deny(other.request, "not that column")
    world.frame(Status(said.request), Status(said.request))
    world.frame(Run(SUM.digest, (1,), (20,)), Fetch((20,)))
    hers.deny(said.request, "enough")
    assert "plans.ask" in world.why(Run(SUM.digest, (1,), (21,)))
    gate.ledger.close()

    world.worker.gate = gate_of(tmp_path)
    world.door = world.opened()
    world.frame(Status(said.request))
    assert world.worker.gate.ledger is not None
    world.worker.gate.ledger.close()
    account = Account(tmp_path)
    account.verify()
    entries = [sealed.entry for sealed in account.entries()]
    assert [entry.kind for entry in entries] == [
        "policy", "run", "request", "request", "approval", "denial", "run", "release", "denial", "refusal", "run",
    ]  # fmt: skip
    assert re.fullmatch(r"version 1, SHA-256 [0-9a-f]{64}: LOOSER: use.plans: adds me; .*", entries[0].decision)
    assert re.fullmatch(r"request \w{16}: 2 times until .* UTC, and what it makes may leave", entries[4].decision)
    assert entries[5].decision == f"request {other.request}: not that column"
    assert entries[6].program == entries[7].program == f"{said.digest} (request {said.request})"
    assert entries[7].decision == "allowed by heart: 1 tensor, 1 value"


def test_an_answer_without_a_signature_is_noted_as_such(tmp_path: Path) -> None:
    world = World()
    (said,) = world.frame(Define(SUM), Submit(SUM.digest, (1,), "why")).results
    shelf, name = world.owner.requests._shelf, f"requests/{said.request}.json"
    shelf.write(name, shelf.read(name).replace(b'"pending"', b'"approved"'))
    world.frame(Status(said.request))
    entry = list(world.owner.ledger.entries())[-1].entry
    assert entry.kind == "approval"
    assert "there is no approval that the owner signed" in entry.decision
    assert "plans.ask" in world.why(Run(SUM.digest, (1,), (20,)))


# -- whatever the elements are ----------------------------------------------------------------------------------


def seen_of(made: hc.Program, secrets: torch.Tensor) -> bytes:
    """All that a scientist sees of a program that was approved and run, and of what she tries around it."""
    owner, worker = Owner(), Worker("clinic")
    worker.gate = owner.gate
    for name, values in (("heart", secrets), ("labs", secrets.flip(0).clone())):
        worker.catalogue.register(name, {"x": values})
        owner.policies.register(name, ASKED)
    door = worker.open("me")
    outs = tuple(range(100, 100 + len(made.outputs)))
    door.handle(Frame(1, (Load("heart", (3,)), Load("labs", (4,)))))
    door.handle(Frame(2, (Put(1, share(torch.ones(4, 4))), Put(2, share(torch.full((4, 4), 2.0))))))
    (said,) = door.handle(Frame(3, (Define(made), Submit(made.digest, (1, 2, 3, 4), "why")))).results
    owner.approve(said.request)  # type: ignore[union-attr]  # it is a Requested
    run = Run(made.digest, (1, 2, 3, 4), outs)
    later = tuple(out + 1000 for out in outs)
    frames = (
        (Call("cholesky.default", (Ref(3),), {}, (50,)),),  # on her columns, and it would fail on one of the two
        (run, Describe(outs), Fetch(outs)),
        (msgspec.structs.replace(run, outs=later), Describe(later)),  # not approved any more
        tuple(Call("neg.default", (Ref(out),), {}, (out + 2000,)) for out in outs),
    )
    replies = [door.handle(Frame(number, (Heard(number - 1), *messages))) for number, messages in enumerate(frames, 4)]
    return b"".join(part for reply in replies for part in packed(reply).packets(0))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_what_is_seen_of_a_run_is_the_same_whatever_the_elements_are(seed: int) -> None:
    made, _ = programs(seed)
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e38]).expand(4, 4).clone()
    assert seen_of(made, torch.eye(4)) == seen_of(made, special)


def test_what_is_seen_would_show_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = programs(1)
    monkeypatch.setattr(Gate, "release", lambda *args, **options: None)
    assert seen_of(made, torch.eye(4)) != seen_of(made, torch.zeros(4, 4))
