"""Owned data: found by tag, read through pointers, never sent by the scientist, never written by her."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import housecall as hc
from housecall.owner.ledger import Ledger
from housecall.owner.policy import Budget, Policy
from housecall.pointers.location import Location
from housecall.program.call import Call
from housecall.transport.arrays import share
from housecall.types import Ref
from housecall.wire.messages import Failure, Frame, Load, Put
from housecall.worker.gate import Gate
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


def test_looking_around_asks_nobody(clinic: hc.VirtualWorker) -> None:
    """The owner's policy is asked, and her ledger written, when a column is first used; once a session."""
    kinds = lambda: [sealed.entry.kind for sealed in clinic.owner.ledger.entries()]  # noqa: E731
    found = [*clinic.search("#heart"), clinic.dataset("heart")]
    both = found[0] + found[1]
    loader = hc.FederatedDataLoader(both, batch_size=4, shuffle=True)
    assert (len(both), len(loader), len(found[0]), repr(loader) != "") == (20, 6, 10, True)
    clinic.session.wait()
    assert kinds() == ["policy"]
    assert clinic._objects == {}
    assert not clinic.session.guarded
    assert found[0].column("x").shape == (10, 4)
    clinic.session.wait()
    assert kinds() == ["policy", "run"]
    assert clinic.session.guarded
    assert len(list(loader)) == 6
    assert found[0].column("y").sum().get() == 45
    assert kinds() == ["policy", "run", "release"]


def test_what_may_not_be_used_may_be_found(clinic: hc.VirtualWorker) -> None:
    clinic.add("closed", x=X, tags=["#closed"])
    (found,) = clinic.search("#closed")
    clinic.session.wait()
    assert clinic.session.failures == 0
    with pytest.raises(hc.OperatorError, match=r"does not let 'me' work on it") as caught:
        (found.column("x") + 1).get()
    assert "found.column" in caught.value.site


def test_the_unit_of_privacy_is_said_and_whose_records_they_are_is_not(clinic: hc.VirtualWorker) -> None:
    subjects = torch.arange(10) // 3
    clinic.add("visits", x=X, y=Y, subject=subjects, unit="person", person="subject", policy=OPEN, replace=True)
    found = clinic.dataset("visits")
    assert (found.unit, clinic.dataset("heart").unit) == ("person", "record")
    assert found.columns == {"x": "float32[4]", "y": "int64[]"}
    assert repr(found).startswith("<dataset 'visits' (person) at clinic: 10 records")
    with pytest.raises(hc.UsageError, match="'visits' has no column 'subject'; it has x, y"):
        found.column("subject")
    assert [len(batch) for batch in hc.FederatedDataLoader(found, batch_size=10)] == [2]
    assert torch.equal(clinic.worker.catalogue.persons("visits"), subjects)
    with pytest.raises(hc.UsageError, match="'heart' protects records"):
        clinic.worker.catalogue.persons("heart")


def test_labels_carry_the_unit_through_what_is_computed(clinic: hc.VirtualWorker) -> None:
    clinic.add("visits", x=X, subject=Y, unit="person", person="subject", policy=OPEN)
    both = clinic.dataset("visits").column("x") @ clinic.dataset("heart").column("x").t()
    clinic.session.wait()
    label = clinic._door.store.label(both.id_at_location)
    assert str(label) == "heart + visits (person)"
    assert (label.unit("heart"), label.unit("visits")) == ("record", "person")


def test_a_column_that_is_to_be_seen_is_registered_twice(clinic: hc.VirtualWorker) -> None:
    clinic.add("visits", x=X, subject=Y, who=Y, unit="person", person="subject", policy=OPEN)
    assert torch.equal(clinic.dataset("visits").column("who").get(), Y)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"unit": "person"}, "name the column that says whose record each is, as in person='subject'"),
        ({"person": "y"}, r"person='y' says whose record each is: .* needs unit='person'"),
        ({"unit": "people", "person": "y"}, "is 'record' or 'person', found 'people'"),
        ({"unit": "person", "person": "z"}, "no column 'z' for person=; it has x, y"),
        ({"unit": "person", "person": "x"}, r"expected one whole number a record, found float32\[4\]"),
    ],
)
def test_units_that_cannot_be_meant(clinic: hc.VirtualWorker, options: dict[str, str], reason: str) -> None:
    with pytest.raises(hc.UsageError, match=reason):
        clinic.add("visits", x=X, y=Y, **options)  # type: ignore[arg-type]  # that is what is tried
    with pytest.raises(hc.UsageError, match="has no column but 'y', which stays with you"):
        clinic.add("visits", y=Y, unit="person", person="y")
    assert [found.name for found in clinic.search()] == ["heart"]


def test_a_budget_by_record_does_not_fit_data_by_person(clinic: hc.VirtualWorker) -> None:
    person = {"unit": "person", "person": "y"}
    spends = Policy(budget=Budget(epsilon=1.0))
    with pytest.raises(hc.PolicyError, match=r"'visits' protects persons, .* counts by record.* unit = \"person\""):
        clinic.add("visits", x=X, y=Y, policy=spends, **person)  # type: ignore[arg-type]  # strings, both
    assert [found.name for found in clinic.search()] == ["heart"]
    clinic.add("visits", x=X, y=Y, policy=Policy(budget=Budget(epsilon=1.0, unit="person")), **person)  # type: ignore[arg-type]
    clinic.add("records", x=X, policy=spends)
    with pytest.raises(hc.PolicyError, match="policy of 'other' is a dict"):
        clinic.add("other", x=X, policy={})  # type: ignore[arg-type]  # that is what is tried


# -- other data under an old name --------------------------------------------------------------------------------

ASKING = Policy(use=hc.Use(interactive=("me",)), release=hc.Release(approvals=True))
GONE = "data set 'heart' was removed or replaced since this session loaded it"


def test_what_derives_from_replaced_data_stays(clinic: hc.VirtualWorker) -> None:
    clinic.add("heart", x=X, y=Y, policy=ASKING, replace=True)
    found = clinic.dataset("heart")
    before, approved = found.column("x").sum(), found.column("x").mean()
    request = approved.request("for a figure")
    clinic.owner.approve(clinic.owner.pending()[0].id)
    clinic.add("heart", x=X * 0, y=Y, policy=OPEN, replace=True)
    for taken in (before, approved, before + 1, found.column("y").clone()):
        with pytest.raises(hc.PolicyError, match=GONE):
            taken.get()
        last = list(clinic.owner.ledger.entries())[-1].entry
        assert (last.kind, last.data_sets, GONE in last.decision) == ("refusal", ("heart",), True)
    with pytest.raises(hc.OperatorError, match=GONE):
        (before * 2).request("again")
    with pytest.raises(hc.OperatorError, match=GONE):  # one session, one meaning of a name
        clinic.dataset("heart").column("x").sum().get()
    assert torch.ones(2).send(clinic).get().sum() == 2  # type: ignore[attr-defined]  # her own is hers
    del request
    clinic.clear()
    assert clinic.dataset("heart").column("x").sum().get() == 0


def test_who_holds_nothing_of_the_old_data_goes_on(clinic: hc.VirtualWorker) -> None:
    """As in a notebook, where the cell that registers the data runs twice."""
    assert clinic.dataset("heart").column("x").sum().get() == X.sum()
    clinic.add("heart", x=X * 2, y=Y, policy=OPEN, replace=True)
    assert clinic.dataset("heart").column("x").sum().get() == X.sum() * 2
    kept = clinic.dataset("heart").column("x")[0]
    clinic.session.wait()
    clinic.add("heart", x=X * 3, y=Y, policy=OPEN, replace=True)
    with pytest.raises(hc.OperatorError, match=GONE):
        clinic.dataset("heart").column("x").sum().get()
    del kept
    assert clinic.dataset("heart").column("x").sum().get() == X.sum() * 3


def test_data_that_is_replaced_while_a_release_is_decided(clinic: hc.VirtualWorker) -> None:
    """The rules of the new data are asked for a value of the old, by an unlucky thread: it stays."""
    clinic.add("heart", x=X, y=Y, policy=ASKING, replace=True)
    total = clinic.dataset("heart").column("x").sum()
    clinic.session.wait()
    ask = clinic.owner.gate.release

    def unlucky(*args: Any, **options: Any) -> None:
        clinic.owner.gate.release = ask  # type: ignore[method-assign]  # put back
        clinic.add("heart", x=X * 0, y=Y, policy=OPEN, replace=True)
        ask(*args, **options)

    clinic.owner.gate.release = unlucky  # type: ignore[method-assign]  # as above
    with pytest.raises(hc.PolicyError, match=GONE):
        total.get()


@pytest.mark.parametrize("columns", [{"x": X[:5], "y": Y[:5]}, {"x": X.double(), "y": Y}, {"x": X, "z": Y}])
def test_data_that_was_replaced_between_search_and_use(clinic: hc.VirtualWorker, columns: Any) -> None:
    found = clinic.dataset("heart")
    clinic.add("heart", policy=OPEN, replace=True, **columns)
    with pytest.raises(hc.OperatorError, match=r"was replaced since it was found: .* now; look it up anew"):
        found.column("x").sum().get()
    assert clinic.dataset("heart").column("x").sum().get() == columns["x"].sum()


def test_data_of_the_same_schema_may_come_between_search_and_use(clinic: hc.VirtualWorker) -> None:
    found = clinic.dataset("heart")
    clinic.add("heart", x=X * 2, y=Y, policy=OPEN, replace=True)
    assert found.column("x").sum().get() == X.sum() * 2


def test_removed_data_is_gone_for_sessions_too(clinic: hc.VirtualWorker) -> None:
    found = clinic.dataset("heart")
    total = found.column("x").sum()
    clinic.session.wait()
    clinic.remove("heart")
    assert clinic.search() == []
    for late in (total, total * 2, found.column("y")):
        with pytest.raises(hc.HousecallError, match=GONE):
            late.get()
    clinic.clear()
    with pytest.raises(hc.OperatorError, match="there is no data set 'heart'"):
        clinic.dataset("heart")


def test_data_that_was_removed_between_search_and_use(clinic: hc.VirtualWorker) -> None:
    found = clinic.dataset("heart")
    clinic.remove("heart")
    with pytest.raises(hc.OperatorError, match="data set 'heart' does not let 'me' work on it"):
        found.column("x").sum().get()


def test_what_is_removed_may_be_added_anew(clinic: hc.VirtualWorker) -> None:
    kept = clinic.dataset("heart").column("x") * 1
    clinic.session.wait()
    clinic.remove("heart")
    clinic.add("heart", x=X * 2, y=Y)  # its rules do not come back with the name
    with pytest.raises(hc.PolicyError, match=GONE):
        kept.get()
    del kept
    with pytest.raises(hc.OperatorError, match="does not let 'me' work on it"):
        clinic.dataset("heart").column("x").sum().get()
    clinic.add("heart", x=X * 2, y=Y, policy=OPEN, replace=True)
    assert clinic.dataset("heart").column("x").sum().get() == X.sum() * 2


def test_that_data_was_removed_is_in_the_ledger(clinic: hc.VirtualWorker) -> None:
    before = len(list(clinic.owner.ledger.entries()))
    clinic.remove("heart")
    (last,) = list(clinic.owner.ledger.entries())[before:]
    assert (last.entry.kind, last.entry.data_sets) == ("policy", ("heart",))
    assert last.entry.decision == "nothing is permitted any more: its data set was removed"
    with pytest.raises(hc.DataError, match="no data set 'heart'"):
        clinic.remove("heart")
    clinic.add("closed", x=X)  # without a policy
    clinic.remove("closed")
    assert len(list(clinic.owner.ledger.entries())) == before + 1


def test_what_was_spent_of_data_stays_spent_when_it_is_removed(clinic: hc.VirtualWorker) -> None:
    rules = Policy(use=hc.Use(statistics=("me",)), release=hc.Release(statistics=True), budget=Budget(epsilon=1.0))
    clinic.add("ages", x=X[:, 0].clone(), policy=rules)
    assert clinic.dataset("ages").statistics(hc.Count("x", 0, 20), epsilon=0.75).left == 0.25
    clinic.remove("ages")
    clinic.add("years", x=X[:, 0].clone(), policy=rules)
    assert clinic.dataset("years").statistics(hc.Count("x", 0, 20), epsilon=0.25).left == 0


def test_other_data_without_a_policy_is_closed(clinic: hc.VirtualWorker) -> None:
    clinic.add("heart", x=X, replace=True)
    with pytest.raises(hc.OperatorError, match="does not let 'me' work on it"):
        clinic.dataset("heart").column("x").sum().get()


def test_a_failed_replacement_leaves_data_and_policy(clinic: hc.VirtualWorker) -> None:
    with pytest.raises(hc.UsageError, match="already"):
        clinic.add("heart", x=X)
    with pytest.raises(hc.UsageError, match="different numbers of records"):
        clinic.add("heart", x=X, y=Y[:3], replace=True)
    assert len(list(clinic.owner.ledger.entries())) == 1
    assert clinic.dataset("heart").column("x").sum().get() == X.sum()


def test_randomness_that_drew_from_replaced_data_stays_labelled(clinic: hc.VirtualWorker) -> None:
    drawn = torch.bernoulli(clinic.dataset("heart").column("x") / 40)
    clinic.session.wait()
    del drawn
    clinic.add("heart", x=X * 0, y=Y, policy=OPEN, replace=True)
    clinic.clear()
    with pytest.raises(hc.OperatorError, match=GONE):
        clinic.dataset("heart").column("x").sum().get()


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


def test_other_data_on_disk_needs_the_owners_signature_again(remote: Location) -> None:
    remote.add("moving", x=X, policy=OPEN)  # type: ignore[attr-defined]  # a worker of the cluster
    before = remote.dataset("moving").column("x").sum()
    remote.session.wait()
    remote.add("moving", x=X * 2, replace=True)  # type: ignore[attr-defined]  # as above
    with pytest.raises(hc.PolicyError, match="'moving' was removed or replaced"):
        before.get()
    remote.clear()
    with pytest.raises(hc.OperatorError, match="does not let 'me' work on it"):
        remote.dataset("moving").column("x").sum().get()
    remote.clear()
    remote.add("moving", x=X * 2, policy=OPEN, mock=hc.Fakes(2), replace=True)  # type: ignore[attr-defined]  # as above
    assert remote.dataset("moving").column("x").sum().get() == X.sum() * 2
