"""Updates: what a model has learnt leaves through the stages that policies demand, paid, or not at all."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import housecall as hc
from housecall.errors import PolicyError, UsageError
from housecall.owner.policy import Budget, Plans, Policy, Release, Use
from housecall.privacy.clip import Clip
from housecall.privacy.noise import Noise
from housecall.program.call import Call, Items
from housecall.transport.arrays import share
from housecall.types import Ref
from housecall.wire.messages import Define, Frame, Load, Put, Run, Update, Updated
from housecall.worker.limits import Limits
from housecall.worker.worker import Worker

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(3))
Y = (X[:, 0] > 0).long()
CLIP, LITTLE = Clip(norm=2.0), Noise(multiplier=0.01)


def through(*stages: Any, epsilon: float = 1e6, delta: float = 1e-6, unit: Any = "record") -> Policy:
    return Policy(
        use=Use(interactive=("me",)),
        release=Release(update=stages),
        budget=Budget(epsilon=epsilon, delta=delta, unit=unit),
    )


def trained(model: nn.Module, x: Any, y: Any) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def learnt(model: nn.Module, start: nn.Module) -> torch.Tensor:
    """The difference of all floats, in one row."""
    now, before = model.state_dict(), start.state_dict()
    return torch.cat([(now[name] - before[name]).double().reshape(-1) for name in now if now[name].is_floating_point()])


@pytest.fixture
def clinic() -> Iterator[hc.VirtualWorker]:
    hook = hc.TorchHook(torch)
    yield hc.VirtualWorker(id="clinic")
    hook.remove()


def contract(clinic: Any) -> None:
    """What every worker does."""
    clinic.add("heart", x=X, y=Y, policy=through(CLIP, LITTLE))
    heart = clinic.dataset("heart")
    start = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    model = copy.deepcopy(start)
    expected = learnt(trained(copy.deepcopy(start), X, Y), start)
    parameters = list(model.parameters())
    trained(model.send(clinic), heart.column("x"), heart.column("y"))
    with pytest.raises(PolicyError, match=r"updates through clip\(norm=2\) > noise\(multiplier=0\.01\)"):
        model.get()
    found = model.get_update(start)
    assert found.model is model
    assert 0 < found.left < 1e6
    assert [id(parameter) for parameter in model.parameters()] == [id(parameter) for parameter in parameters]
    assert all(type(parameter) is nn.Parameter and parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model[1].num_batches_tracked == 0  # no noise can be added to it
    clipped = expected * min(1.0, 2.0 / float(expected.norm()))
    assert torch.allclose(learnt(model, start), clipped, atol=6 * 0.02)
    assert not torch.equal(learnt(model, start).float(), clipped.float())
    model(X)  # it is home, and works
    trained(model.send(clinic), heart.column("x"), heart.column("y")).get_update(start)  # and goes again


def test_a_virtual_worker_lets_updates_out(clinic: hc.VirtualWorker) -> None:
    contract(clinic)
    assert len(clinic._objects) == 0


def test_a_worker_of_a_cluster_lets_updates_out() -> None:
    hook = hc.TorchHook(torch)
    with hc.LocalCluster(("clinic",), threads=1) as cluster:
        contract(cluster["clinic"])
    hook.remove()


def test_a_clipped_update_is_the_local_one_to_the_last_place(clinic: hc.VirtualWorker) -> None:
    clinic.add("heart", x=X, y=Y, policy=through(Clip(norm=1e9), epsilon=0, delta=0))
    heart, start = clinic.dataset("heart"), nn.Linear(4, 2)
    local, model = trained(copy.deepcopy(start), X, Y), copy.deepcopy(start)
    trained(model.send(clinic), heart.column("x"), heart.column("y")).get_update(start.state_dict())
    for name, value in local.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, atol=1e-6)


def test_shared_frozen_and_untouched_parameters_come_home(clinic: hc.VirtualWorker) -> None:
    """What derives from nobody's data is no part of the vector, and has no noise."""
    clinic.add("heart", x=X, y=Y, policy=through(CLIP, Noise(multiplier=1.0)))
    heart = clinic.dataset("heart")
    start = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    start[1].weight = start[0].weight
    start[2].weight.requires_grad_(False)
    model = copy.deepcopy(start)
    trained(model.send(clinic), heart.column("x"), heart.column("y"))
    assert model.get_update(start).model[1].weight is model[0].weight
    assert torch.equal(model[2].weight, start[2].weight)
    assert not model[2].weight.requires_grad
    assert not torch.equal(model[2].bias, start[2].bias)


# -- what is none -----------------------------------------------------------------------------------------------


def test_what_is_no_update_is_refused_and_stays(clinic: hc.VirtualWorker) -> None:
    clinic.add("heart", x=X, y=Y, policy=through(CLIP, LITTLE))
    heart, start = clinic.dataset("heart"), nn.Linear(4, 2)
    model = copy.deepcopy(start)
    with pytest.raises(UsageError, match="not at one worker"):
        model.get_update(start)
    model.send(clinic)
    with pytest.raises(UsageError, match="derive from nobody's data: fetch them"):
        model.get_update(start)
    trained(model, heart.column("x"), heart.column("y"))
    for since, says in (
        (nn.Linear(4, 2, bias=False), r"another module: \['bias'\] are in only one"),
        (nn.Linear(4, 3), "was a torch.float32 of"),
        (copy.deepcopy(model), "no tensor here as 'weight': keep a deep copy of the module before you send it"),
        ({"weight": 1, "bias": 2}, "no tensor here as 'weight'"),
    ):
        with pytest.raises(UsageError, match=says):
            model.get_update(since)
        assert all(isinstance(parameter, hc.PointerTensor) for parameter in model.parameters())
    assert model.get_update(start).left < 1e6


def test_frames_by_hand_are_looked_at_as_well(clinic: hc.VirtualWorker) -> None:
    clinic.add("heart", x=X, y=Y, policy=through(CLIP, LITTLE))
    door = clinic.worker.open("me")
    mine = torch.zeros(40, 4), torch.zeros(4, 40), torch.zeros(40, 4).double(), torch.zeros(40).long()
    door.handle(Frame(1, (Load("heart", (1, 2)), *(Put(10 + at, share(value)) for at, value in enumerate(mine)))))
    made = Call("mul.Tensor", (Ref(1), 1.0), {}, (3,)), Call("complex.default", (Ref(1), Ref(1)), {}, (4,))
    door.handle(Frame(2, made))

    def answer(ids: tuple[int, ...], since: tuple[int, ...]) -> Any:
        reply = door.handle(Frame(3, (Update(ids, since),)))
        door.halt.cause = None
        return reply.failures[0].reason if reply.failures else reply.results[0]

    assert isinstance(answer((3,), (10,)), Updated)
    assert "some values since as many others; found 1 values and 2" in answer((3,), (10, 10))
    assert "found 0 values" in answer((), ())
    assert "no value of this session" in answer((99,), (10,))
    assert "no value of this session" in answer((3,), (99,))
    assert "now a float32[40, 4], before a float32[4, 40]" in answer((3,), (11,))
    assert "before a float64" in answer((3,), (12,))
    assert "an update is of real numbers" in answer((2,), (13,))
    assert "an update is of real numbers" in answer((4,), (4,))
    assert "since derives from heart: give what you sent" in answer((3,), (1,))


def test_an_expanded_value_is_measured_as_it_would_leave() -> None:
    worker = Worker("clinic", Limits(reply_bytes=10**12))
    owner = hc.VirtualWorker(id="other").owner
    worker.gate = owner.gate
    worker.catalogue.register("heart", {"x": X.clone()})
    owner.policies.register("heart", through(CLIP, LITTLE))
    door = worker.open("me")
    reply = door.handle(
        Frame(
            1,
            (
                Load("heart", (1,)),
                Put(2, share(torch.zeros(1))),
                Call("sum.default", (Ref(1),), {}, (3,)),
                *(Call("expand.default", (Ref(ref), Items((10**5, 10**5))), {}, (ref + 10,)) for ref in (2, 3)),
                Update((13,), (12,)),
            ),
        )
    )
    assert "LimitError: update would make 640,000,000,000 bytes" in reply.failures[-1].reason


# -- whose data it is -------------------------------------------------------------------------------------------


def test_all_owners_of_a_value_are_asked_and_paid(clinic: hc.VirtualWorker) -> None:
    clinic.add("heart", x=X, policy=through(CLIP, Noise(multiplier=4.0), epsilon=9))
    clinic.add("lungs", x=-X, policy=through(CLIP, epsilon=0, delta=0))
    clinic.add("skin", x=X + 1, policy=through(Clip(norm=3.0), Noise(multiplier=4.0), epsilon=9))
    clinic.add("bones", x=X * 2, who=torch.arange(40), unit="person", person="who",
               policy=through(CLIP, Noise(multiplier=4.0), epsilon=3, unit="person"))  # fmt: skip
    heart, lungs, skin, bones = (clinic.dataset(name).column("x") for name in ("heart", "lungs", "skin", "bones"))

    def ask(value: Any) -> float:
        start = nn.Linear(4, 1, bias=False)
        model = copy.deepcopy(start).send(clinic)
        with torch.no_grad():
            model.weight += value.sum(0, keepdim=True)
        return model.get_update(start).left

    assert ask(heart + lungs) < 9  # the longer pipeline begins as the shorter one
    with pytest.raises(PolicyError, match=r"'skin' lets updates out only through clip\(norm=3\)"):
        ask(heart + skin)
    assert ask(heart + bones) < 3 - 2  # the least that any of them has left
    assert ask(lungs) == math.inf  # of what costs nothing
    spent = clinic.worker.gate.spending.spent(clinic.worker.catalogue.content("heart"))  # type: ignore[union-attr]

    def as_long_as_it_is_paid() -> None:
        while True:
            ask(bones)

    with pytest.raises(PolicyError, match=r"'bones' has 0\..* left of a budget of epsilon 3 for each person"):
        as_long_as_it_is_paid()
    with pytest.raises(PolicyError, match="'bones' has"):
        ask(heart + bones)
    now = clinic.worker.gate.spending.spent(clinic.worker.catalogue.content("heart"))  # type: ignore[union-attr]
    assert now == spent  # nobody pays for what another cannot
    entries = [sealed.entry for sealed in clinic.owner.ledger.entries()]
    paid = [entry for entry in entries if entry.kind == "reserve" and entry.data_sets == ("heart",)]
    assert [entry.pipeline for entry in paid] == [("clip(norm=2)", "noise(multiplier=4)")] * 2
    assert all(entry.privacy is not None and entry.privacy.rho == Noise(multiplier=4.0).rho for entry in paid)
    lets = [entry for entry in entries if entry.kind == "release" and entry.data_sets == ("lungs",)]
    assert {entry.privacy for entry in lets} == {None}
    assert [entry.pipeline for entry in lets] == [("clip(norm=2)", "noise(multiplier=4)"), ("clip(norm=2)",)]
    assert "an update: 1 tensor, 4 values" in lets[0].decision


def test_updates_and_statistics_share_one_budget(clinic: hc.VirtualWorker) -> None:
    rules = Policy(
        use=Use(interactive=("me",), statistics=("me",)),
        release=Release(update=(CLIP, Noise(multiplier=8.0)), statistics=True),
        budget=Budget(epsilon=2, delta=1e-6),
    )
    clinic.add("heart", x=X, policy=rules)
    heart = clinic.dataset("heart")
    heart.statistics(hc.Count("x", 0, 1, index=0), epsilon=0.8)
    start = nn.Linear(4, 1, bias=False)
    model = copy.deepcopy(start).send(clinic)
    with torch.no_grad():
        model.weight += heart.column("x").sum(0, keepdim=True)
    with pytest.raises(
        PolicyError, match=r"has 1\.2 left of a budget of epsilon 2 for each record, and this costs 1\.3"
    ):
        heart.statistics(hc.Count("x", 0, 1, index=0), epsilon=1.1 + 0.2)
    assert model.get_update(start).left == pytest.approx(2 - 0.8 - 1.137, abs=0.01)
    with pytest.raises(PolicyError, match="left of a budget"):
        heart.statistics(hc.Count("x", 0, 1, index=0), epsilon=0.1)


def test_a_failed_private_call_is_not_told_by_an_update(clinic: hc.VirtualWorker) -> None:
    """Values that stand in for what failed are zeros, of which nobody is told."""
    clinic.add("heart", code=torch.tensor([0, 9]), policy=through(Clip(norm=1e9), LITTLE))
    start = nn.Linear(1, 2, bias=False)
    model = copy.deepcopy(start).send(clinic)
    with torch.no_grad():
        model.weight.copy_(F.embedding(clinic.dataset("heart").column("code"), torch.ones(3, 1).send(clinic)))
    assert model.get_update(start).left < 1e6


def test_a_column_that_only_programs_may_read_is_no_update(clinic: hc.VirtualWorker) -> None:
    """What an accepted program makes of it is one."""
    rules = Policy(use=Use(plans=("me",)), plans=Plans(digests=("*",)), release=Release(update=(Clip(norm=1e9),)))
    clinic.add("heart", x=X, policy=rules)
    door = clinic.worker.open("me")
    program = hc.record(lambda x: 2 * x, X).program
    door.handle(Frame(900, (Load("heart", (701,)), Put(702, share(torch.zeros(40, 4))), Define(program))))
    reply = door.handle(Frame(901, (Update((701,), (702,)),)))
    assert "no accepted program has made this value" in reply.failures[0].reason
    door.halt.cause = None
    reply = door.handle(Frame(902, (Run(program.digest, (701,), (703,)), Update((703,), (702,)))))
    assert torch.equal(reply.results[0].arrays[0].data, 2 * X)


def test_an_update_takes_as_much_of_a_reply_as_it_fills() -> None:
    """A number that is repeated is said as one, and leaves as many."""
    worker = Worker("clinic", Limits(reply_bytes=1_000_000))
    owner = hc.VirtualWorker(id="other").owner
    worker.gate = owner.gate
    worker.catalogue.register("heart", {"x": X.clone()})
    owner.policies.register("heart", through(CLIP, epsilon=0, delta=0))
    door, many = worker.open("me"), Items((1_000, 1_000))
    made = (
        Call("sum.default", (Ref(1),), {}, (2,)),
        Call("expand.default", (Ref(2), many), {}, (3,)),
        Call("expand.default", (Ref(4), many), {}, (5,)),
    )
    reply = door.handle(Frame(1, (Load("heart", (1,)), Put(4, share(torch.zeros(1))), *made, Update((3,), (5,)))))
    assert reply.results == ()
    assert "update would take 4,000,000 bytes of a reply" in reply.failures[0].reason


def test_a_buffer_that_no_state_has_comes_home_as_well(clinic: hc.VirtualWorker) -> None:
    """And what a state has beside tensors is no matter."""

    class Turned(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 2)
            self.register_buffer("signs", torch.ones(4), persistent=False)

        def get_extra_state(self) -> Any:
            return {"turned": True}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * self.signs)

    clinic.add("heart", x=X, y=Y, policy=through(CLIP, LITTLE))
    heart, start = clinic.dataset("heart"), Turned()
    model: Any = trained(copy.deepcopy(start).send(clinic), heart.column("x"), heart.column("y"))  # type: ignore[operator]  # the hook added it
    with pytest.raises(UsageError, match="signs"):
        model.get_update(start.state_dict())
    model.get_update(start)
    assert type(model.signs) is torch.Tensor
    assert torch.allclose(model.signs, torch.ones(4), atol=0.2)
    assert model(X).shape == (40, 2)
