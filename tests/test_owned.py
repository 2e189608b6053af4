"""Owned data: found by tag, read through pointers, never sent by the scientist, never written by her."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import housecall as hc
from housecall.pointers.location import Location
from housecall.program.call import Call
from housecall.transport.arrays import share
from housecall.types import Ref
from housecall.wire.messages import Failure, Frame, Load, Put
from housecall.worker.gate import Gate
from housecall.worker.ledger import Ledger
from housecall.worker.policy import Policy
from housecall.worker.worker import Worker

OPEN = Policy.open_to("*")
X = torch.arange(40.0).view(10, 4)
Y = torch.arange(10)


@pytest.fixture(params=["direct", "codec"])
def clinic(request: pytest.FixtureRequest) -> hc.VirtualWorker:
    worker = hc.VirtualWorker(id="clinic", codec=request.param == "codec")
    worker.add("heart", x=X.clone(), y=Y.clone(), tags=["#heart", "#2026"], description="ten hearts", policy=OPEN)
    return worker


def test_a_data_set_is_found_by_its_tags(clinic: hc.VirtualWorker) -> None:
    (heart,) = clinic.search("#heart")
    assert isinstance(heart, hc.OwnedDataset)
    assert heart.location is clinic
    assert (heart.name, heart.count, len(heart)) == ("heart", 10, 10)
    assert heart.columns == {"x": "float32[4]", "y": "int64[]"}
    assert heart.tags == ("#heart", "#2026")
    assert heart.description == "ten hearts"
    assert clinic.search("#heart", "#1999") == []
    assert "10 records of x: float32[4], y: int64[] #heart #2026" in repr(heart)


def test_values_and_data_sets_are_found_together(clinic: hc.VirtualWorker) -> None:
    mine = torch.ones(3).send(clinic).tag("#heart")
    value, heart = clinic.search("#heart")
    assert value.id_at_location == mine.id_at_location
    assert heart.name == "heart"


def test_batches_are_pointers_to_the_owners_records(clinic: hc.VirtualWorker) -> None:
    loader = hc.FederatedDataLoader(clinic.dataset("heart"), batch_size=4)
    batches = list(loader)
    assert len(batches) == len(loader) == 3
    assert all(x.location is clinic for x, _ in batches)
    assert torch.equal(torch.cat([x.copy().get() for x, _ in batches]), X)
    assert torch.equal(torch.cat([y.copy().get() for _, y in batches]), Y)
    shuffled = hc.FederatedDataLoader(clinic.dataset("heart"), batch_size=4, shuffle=True)
    rows = torch.cat([y.copy().get() for _, y in shuffled])
    assert sorted(rows.tolist()) == Y.tolist()


def test_nothing_of_it_was_sent(clinic: hc.VirtualWorker) -> None:
    for x, y in hc.FederatedDataLoader(clinic.dataset("heart"), batch_size=4):
        (x.sum() + y.sum()).get()
    assert clinic.session.bytes_sent == 0


def test_several_owners_are_joined() -> None:
    owners = [hc.VirtualWorker(id=name) for name in ("cleveland", "zurich")]
    for number, owner in enumerate(owners):
        owner.add("heart", x=X + number, y=Y, policy=OPEN)
    both = owners[0].dataset("heart") + owners[1].dataset("heart")
    assert both.workers == owners
    assert len(both) == 20
    for dataset in (both, [owner.dataset("heart") for owner in owners]):
        loader = hc.FederatedDataLoader(dataset, batch_size=5)
        assert [x.location.id for x, _ in loader] == ["cleveland"] * 2 + ["zurich"] * 2


def test_a_model_trains_on_it(clinic: hc.VirtualWorker) -> None:
    torch.manual_seed(0)
    local, remote = nn.Linear(4, 2), nn.Linear(4, 2)
    remote.load_state_dict(local.state_dict())
    labels = Y % 2
    clinic.add("labelled", x=X, y=labels, policy=OPEN)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in (local, remote)]
    for (x, y), start in zip(hc.FederatedDataLoader(clinic.dataset("labelled"), batch_size=5), (0, 5), strict=True):
        remote.send(clinic)
        F.cross_entropy(remote(x), y).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        remote.get()
        F.cross_entropy(local(X[start : start + 5]), labels[start : start + 5]).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
    assert torch.equal(remote.weight, local.weight)


def test_owned_data_cannot_be_written(clinic: hc.VirtualWorker) -> None:
    column = clinic.dataset("heart").column("x")
    for write in (lambda c: c.add_(1), lambda c: c[2:4].zero_(), lambda c: c.t()[0].mul_(2)):
        write(column)
        with pytest.raises(hc.OperatorError, match=r"owner.* to be read; clone"):
            clinic.session.wait()
    assert torch.equal(clinic.dataset("heart").column("x").copy().get(), X)
    assert torch.equal(column.clone().add_(1).get(), X + 1)


def test_getting_a_column_takes_nothing_away(clinic: hc.VirtualWorker) -> None:
    assert torch.equal(clinic.dataset("heart").column("x").get(), X)
    assert torch.equal(clinic.dataset("heart").column("x").get(), X)


def test_two_sessions_share_the_data_and_nothing_else() -> None:
    worker = Worker("clinic", gate=Gate({"heart": OPEN}, ledger=Ledger()))
    worker.catalogue.register("heart", {"x": X.clone()})
    one, other = worker.open("alice"), worker.open("bob")
    for session in (one, other):
        assert session.handle(Frame(1, (Load("heart", (7,)),))).failures == ()
    assert one.store[7].data_ptr() == other.store[7].data_ptr()
    one.close()
    assert torch.equal(other.store[7], X)


def test_an_unknown_name_is_an_error_that_helps(clinic: hc.VirtualWorker) -> None:
    with pytest.raises(hc.OperatorError, match=r"'hart'.*heart") as caught:
        clinic.dataset("hart")
    assert caught.value.worker == "clinic"
    assert "test_owned.py" in caught.value.site
    with pytest.raises(hc.UsageError, match="no column 'z'; it has x, y"):
        clinic.dataset("heart").column("z")


def test_a_load_must_name_every_column() -> None:
    worker = Worker("clinic", gate=Gate({"heart": OPEN}, ledger=Ledger()))
    worker.catalogue.register("heart", {"x": X, "y": Y})
    session = worker.open("mallory")
    for ids in ((), (1,), (1, 2, 3), (0, 1), (-1, 1), (4, 4)):
        (failure,) = session.handle(Frame(1, (Load("heart", ids),))).failures
        assert isinstance(failure, Failure)
        assert dict(session.store.tensors()) == {}
    session.handle(Frame(2, (Put(9, share(torch.ones(2))),)))
    (failure,) = session.handle(Frame(3, (Load("heart", (9, 10)),))).failures
    assert "bound" in failure.reason
    assert torch.equal(session.store[9], torch.ones(2))


def test_raw_writes_are_refused_too() -> None:
    worker = Worker("clinic", gate=Gate({"heart": OPEN}, ledger=Ledger()))
    worker.catalogue.register("heart", {"x": X.clone()})
    session = worker.open("mallory")
    session.handle(Frame(1, (Load("heart", (1,)), Call("t.default", (Ref(1),), {}, (2,)))))
    for call in (
        Call("zero_.default", (Ref(2),), {}, ()),
        Call("add.out", (Ref(1), Ref(1)), {"out": Ref(1)}, ()),
        Call("copy_.default", (Ref(1), Ref(1)), {}, ()),
    ):
        (failure,) = session.handle(Frame(2, (call,))).failures
        assert failure.reason
    assert torch.equal(session.store[1], X)


@pytest.fixture(scope="module")
def remote() -> Iterator[Location]:
    with hc.LocalCluster(["clinic"]) as cluster:
        cluster[0].add("heart", x=X, y=Y, tags=["#heart"], policy=OPEN)
        yield cluster[0]


def test_what_another_process_adds_is_found_over_the_wire(remote: Location) -> None:
    (heart,) = remote.search("#heart")
    assert torch.equal(torch.cat([x.get() for x, _ in hc.FederatedDataLoader(heart, batch_size=3)]), X)
    column = heart.column("x")
    column.add_(1)
    with pytest.raises(hc.OperatorError, match=r"owner.* to be read; clone"):
        remote.session.wait()
    assert torch.equal(remote.dataset("heart").column("x").get(), X)
