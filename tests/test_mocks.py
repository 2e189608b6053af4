"""Mocks: made-up records for whoever finds a data set, never the data, and never in its place."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import housecall as hc
from housecall.owned import catalogue as module
from housecall.owned.catalogue import Catalogue
from housecall.owned.mocks import Fakes, fitted
from housecall.owner.policy import Policy
from housecall.pointers.mock import by_hand, mock_of
from housecall.pointers.session import Session
from housecall.program.typing import DTYPES
from housecall.transport.arrays import share
from housecall.types import TensorType
from housecall.wire.codec import ITEM_BYTES
from housecall.wire.messages import Column, Frame, Load, Mock, Mocked, Owned
from housecall.worker.limits import Limits
from housecall.worker.worker import Worker

X, Y = torch.arange(40.0).view(10, 4), torch.arange(10) % 3
MOCK = {"x": torch.full((3, 4), -1.0), "y": torch.tensor([0, 1, 2])}


def types(**columns: torch.Tensor) -> dict[str, TensorType]:
    return Catalogue().register("data", columns).columns


# -- made up --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_every_dtype_is_made_up(dtype: str) -> None:
    data = {"x": torch.zeros(2, 3).to(DTYPES[dtype])}
    ranges: dict[str, Any] = {"x": (0, 1)} if "int" in dtype else {}
    mock = fitted("data", types(**data), data, Fakes(7, **ranges))
    assert (mock["x"].dtype, mock["x"].shape) == (DTYPES[dtype], (7, 3))


def test_ranges_hold_and_reach_their_ends() -> None:
    data = {"age": torch.zeros(2), "grade": torch.zeros(2, dtype=torch.int8), "y": torch.zeros(2, dtype=torch.int64)}
    mock = fitted("data", types(**data), data, Fakes(2000, age=(20, 90.5), grade=(-2, 1), y=3))
    assert 20 <= mock["age"].min() < 25
    assert 85 < mock["age"].max() <= 90.5
    assert mock["grade"].unique().tolist() == [-2, -1, 0, 1]
    assert mock["y"].unique().tolist() == [0, 1, 2]


def test_columns_whose_names_are_taken_are_made_up_too() -> None:
    data = {"seed": Y, "records": Y, "a b": Y}
    mock = fitted("data", types(**data), data, Fakes(9, {"seed": 1, "records": (5, 5), "a b": (7, 7)}))
    assert [column.unique().tolist() for column in mock.values()] == [[0], [5], [7]]


def test_the_largest_numbers_are_made_up() -> None:
    data = {"x": torch.zeros(2, dtype=torch.uint64), "y": torch.zeros(2, dtype=torch.int64)}
    top = 2**63 - 2
    assert fitted("data", types(**data), data, Fakes(2, x=(top, top), y=(-(2**63), top)))["x"].tolist() == [top, top]


def test_what_is_made_up_does_not_depend_on_the_data_nor_on_the_callers_generator() -> None:
    before = torch.get_rng_state()
    one, other = (fitted("data", types(x=data), {"x": data}, Fakes(5)) for data in (X, X * 1000))
    assert torch.equal(one["x"], other["x"])
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(fitted("data", types(x=X), {"x": X}, Fakes(5, seed=1))["x"], one["x"])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Fakes(0), "at least one record"),
        (lambda: Fakes(True), "at least one record"),
        (lambda: Fakes(seed=(0, 1)), "for columns of these names write Fakes"),  # type: ignore[arg-type]  # tried
        (lambda: Fakes(ranges=(0, 1)), "for columns of these names write Fakes"),  # type: ignore[arg-type]  # tried
        (lambda: Fakes(x=(1, 0)), r"range of column 'x' is \(least, greatest\).* found \(1, 0\)"),
        (lambda: Fakes(x=(0, float("nan"))), "range of column 'x'"),
        (lambda: Fakes(x=0), "range of column 'x'"),
        (lambda: Fakes(x="0:1"), "range of column 'x'"),
        (lambda: fitted("d", types(x=X), {"x": X}, Fakes(z=(0, 1))), "a range is given for z, but 'd' has x"),
        (lambda: fitted("d", types(y=Y), {"y": Y}, Fakes()), r"'y' is int64, .* y=\(0, 9\) or --range y=0:9"),
        (lambda: fitted("d", types(y=Y), {"y": Y}, Fakes(y=(0, 0.5))), "of whole numbers from"),
        (lambda: fitted("d", types(y=Y.to(torch.uint8)), {"y": Y}, Fakes(y=(0, 256))), "from 0 to 255; found"),
        (lambda: fitted("d", types(y=Y > 0), {"y": Y > 0}, Fakes(y=2)), "'y' is bool, which is made up without"),
    ],
)
def test_ranges_that_cannot_be_meant(make: Any, reason: str) -> None:
    with pytest.raises(hc.UsageError, match=reason):
        make()


# -- given by the owner ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mock", "reason"),
    [
        ({"x": X[:2].clone()}, "has columns x; expected those that the data set offers: x, y"),
        ({**MOCK, "z": X}, "has columns x, y, z; expected"),
        ({}, "has columns none; expected"),
        (
            {**MOCK, "x": torch.zeros(3, 5)},
            r"column 'x' of the mock of 'heart' holds float32\[5\] .* holds float32\[4\]",
        ),
        ({**MOCK, "y": torch.zeros(3)}, r"column 'y' of the mock of 'heart' holds float32\[\] .* holds int64\[\]"),
        ({**MOCK, "y": torch.zeros(2).long()}, "'x' has 3, 'y' has 2"),
        ({"x": torch.zeros(0, 4), "y": torch.zeros(0).long()}, "'x' has 0, 'y' has 0"),
        ({**MOCK, "x": [1.0]}, "column 'x' is a list, expected a torch tensor"),
        (torch.zeros(3, 4), "a column cannot be called so here"),
        (X.numpy(), r"mock= of data set 'heart' is a ndarray: expected columns such as \{'x': tensor\}"),
        ({"x": X[:3], "y": MOCK["y"]}, "give away real records: column 'x' of it is a view of the data"),
        ({"x": X.clone(), "y": Y.clone()}, "give away real records: it is the data itself"),
        ({"x": torch.zeros_like(X), "y": Y.clone()}, "give away real records: column 'y' of it is the data's"),
    ],
)
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_mocks_that_do_not_fit(mock: Any, reason: str, where: str, tmp_path: Path) -> None:
    clinic, columns = hc.VirtualWorker(id="clinic"), {"x": X, "y": Y}
    on_disk = where == "disk" and not isinstance(mock, torch.Tensor)  # that is what `check_words` is for
    add: Any = (lambda name, **options: Catalogue(tmp_path).add(name, columns, **options)) if on_disk else clinic.add
    with pytest.raises(hc.UsageError, match=reason):
        add("heart", mock=mock, **({} if on_disk else columns))
    assert clinic.search() == []
    assert Catalogue(tmp_path).names() == ()


@pytest.mark.parametrize("word", ["tags", "description", "mock", "unit", "person", "policy", "replace"])
def test_a_column_that_is_called_like_an_option(word: str) -> None:
    options: dict[str, Any] = {word: X}
    with pytest.raises(hc.UsageError, match=rf"{word}= is an option of add.* cannot be called so .* tags, description"):
        hc.VirtualWorker(id="clinic").add("heart", y=Y, **options)


def test_a_column_may_be_called_name() -> None:
    clinic = hc.VirtualWorker(id="clinic")
    clinic.add("heart", name=Y, policy=Policy.open_to("me"))
    assert clinic.dataset("heart").columns == {"name": "int64[]"}


def test_the_owners_mock_is_a_copy() -> None:
    mock = {name: column.clone() for name, column in MOCK.items()}
    clinic = hc.VirtualWorker(id="clinic")
    clinic.add("heart", x=X, y=Y, mock=mock)
    mock["x"].zero_()
    assert torch.equal(clinic.dataset("heart").mock().column("x"), MOCK["x"])


# -- a scientist's view -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[hc.LocalCluster]:
    with hc.LocalCluster(["clinic"]) as cluster:
        yield cluster


@pytest.fixture(params=["direct", "codec", "cluster"])
def clinic(request: pytest.FixtureRequest) -> Any:
    if request.param == "cluster":
        return request.getfixturevalue("cluster")[0]
    return hc.VirtualWorker(id="clinic", codec=request.param == "codec")


def test_a_mock_is_had_without_a_policy_and_leaves_no_trace(clinic: Any) -> None:
    clinic.add("closed", x=X, y=Y, mock=MOCK, tags=["#closed"])
    (found,) = clinic.search("#closed")
    mock = found.mock()
    assert isinstance(mock, hc.MockDataset)
    assert (len(mock), mock.columns, mock.name, mock.worker) == (3, ("x", "y"), "closed", "clinic")
    assert repr(mock) == "<mock of 'closed' at clinic: 3 records of x: float32[4], y: int64[]; none of them is real>"
    assert repr(found).endswith("#closed, mock of 3>")
    for name in ("x", "y"):
        assert torch.equal(mock.column(name), MOCK[name])
        assert type(mock.column(name)) is torch.Tensor
    with pytest.raises(hc.UsageError, match="mock of 'closed' has no column 'z'; it has x, y"):
        mock.column("z")
    with pytest.raises(hc.OperatorError, match="does not let 'me' work on it"):
        found.column("x").sum().get()
    if isinstance(clinic, hc.VirtualWorker):
        assert [sealed.entry.kind for sealed in clinic.owner.ledger.entries()] == ["refusal"]


def test_writing_to_a_mock_changes_nobody_elses(clinic: Any) -> None:
    clinic.add("written", x=X, y=Y, mock=MOCK)
    clinic.dataset("written").mock().column("x").zero_()
    assert torch.equal(clinic.dataset("written").mock().column("x"), MOCK["x"])


def test_a_large_mock_travels(clinic: Any) -> None:
    clinic.add("large", x=torch.zeros(2, 1000), mock=Fakes(3000))
    assert torch.equal(
        clinic.dataset("large").mock().column("x"), torch.randn(3000, 1000, generator=torch.Generator().manual_seed(0))
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> Any:
    x, y = batch
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


def test_a_step_that_runs_on_the_mock_runs_on_the_data(clinic: Any) -> None:
    clinic.add("trained", x=X, y=Y, mock=Fakes(8, x=(0, 40), y=3), policy=Policy.open_to("me"))
    found = clinic.dataset("trained")
    hook = hc.TorchHook(torch)
    losses = []
    for batches in (
        DataLoader(found.mock(), batch_size=4),
        hc.FederatedDataLoader(found.mock().federate((clinic,)), batch_size=4),  # type: ignore[attr-defined]
        hc.FederatedDataLoader(found, batch_size=4),
    ):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        if isinstance(batches, hc.FederatedDataLoader):
            model.send(clinic)  # type: ignore[operator]  # the hook adds it
        losses.append([step(model, optimizer, batch) for batch in batches])
    local, mock, real = losses
    assert [loss.item() for loss in local] == pytest.approx([loss.item() for loss in mock])
    assert len(real) == 3
    assert all(loss.location is clinic for loss in real)
    hook.remove()


def test_a_program_recorded_on_the_mock_runs_on_the_data(clinic: Any) -> None:
    clinic.add("recorded", x=X, y=Y, mock=Fakes(5, y=3), policy=Policy.open_to("me"))
    found = clinic.dataset("recorded")

    def loss_of(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x @ weight, y)

    weight = torch.randn(4, 3)
    recorded = hc.record(loss_of, *found.mock()[:5], weight)
    x, y = next(iter(hc.FederatedDataLoader(found, batch_size=5)))
    loss = recorded(x, y, hc.send(weight, clinic)).get()
    assert loss.item() == pytest.approx(loss_of(X[:5], Y[:5], weight).item())


def test_one_column_is_a_batch_by_itself(clinic: Any) -> None:
    clinic.add("one", x=X, mock=Fakes(4), policy=Policy.open_to("me"))
    hook = hc.TorchHook(torch)
    found = clinic.dataset("one")
    federated = found.mock().federate((clinic,))  # type: ignore[attr-defined]  # the hook adds it
    for batches in (
        DataLoader(found.mock(), batch_size=2),
        hc.FederatedDataLoader(federated, 2),
        hc.FederatedDataLoader(found, 2),
    ):
        assert {tuple(batch.shape) for batch in batches} == {(2, 4)}
    hook.remove()


def test_what_is_computed_of_a_mock_is_ones_own(clinic: Any) -> None:
    clinic.add("own", x=X, mock=Fakes(4), policy=Policy())
    there = hc.send(clinic.dataset("own").mock().column("x"), clinic)
    assert (there * 0 + 1).sum().get() == 16


def test_without_a_mock_the_error_says_how_to_make_one_up(clinic: Any) -> None:
    clinic.add("bare", x=X, y=Y)
    text = r"gives no mock of it. Its records are x: float32\[4\], y: int64\[\]; make some up: torch.utils.data.Tensor"
    with pytest.raises(hc.DataError, match=text):
        clinic.dataset("bare").mock()


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_what_the_error_says_has_the_schema(dtype: str) -> None:
    owned = Owned("a", (Column("x", dtype, (2, 3)), Column("y", dtype, ())), 5, (), "")
    made = eval(by_hand(owned), {"torch": torch})
    assert [(one.dtype, one.shape[1:]) for one in made.tensors] == [(DTYPES[dtype], (2, 3)), (DTYPES[dtype], ())]


def test_a_mock_that_was_taken_back_since_it_was_found(clinic: Any) -> None:
    clinic.add("back", x=X, mock=Fakes(4))
    found = clinic.dataset("back")
    clinic.add("back", x=X + 1, replace=True)
    with pytest.raises(hc.OperatorError, match="data set 'back' has no mock"):
        found.mock()


@pytest.mark.parametrize(
    "columns",
    [
        (torch.zeros(3, 4),),
        (torch.zeros(3, 4), torch.zeros(3)),
        (torch.zeros(3, 5), torch.zeros(3).long()),
        (torch.zeros(3, 4), torch.zeros(2).long()),
        (torch.zeros(3, 4), torch.zeros(()).long()),
        (),
    ],
)
def test_a_worker_that_lies_about_its_mock(columns: tuple[torch.Tensor, ...]) -> None:
    owned = Owned("heart", (Column("x", "float32", (4,)), Column("y", "int64", ())), 5, (), "", mock=3)
    with pytest.raises(hc.ProtocolError, match="worker 'clinic' gave a mock of 'heart' that has not its schema"):
        mock_of(owned, "clinic", Mocked(tuple(map(share, columns))))


# -- limits, and what is never served -----------------------------------------------------------------------------


def test_a_mock_counts_against_a_replys_limit() -> None:
    worker = Worker("clinic", Limits(reply_bytes=200))
    worker.catalogue.register("heart", {"x": X}, mock=Fakes(10))
    worker.catalogue.register("small", {"x": X}, mock=Fakes(3))
    session = worker.open("alice")
    assert session.handle(Frame(1, (Mock("small"), Mock("heart")))).failures[0].reason.startswith("LimitError: ")
    assert session.handle(Frame(2, (Mock("small"),) * 4)).failures == ()
    reply = session.handle(Frame(3, (Mock("small"),) * 5))
    assert len(reply.results) == 4
    assert "carries 192: ask for less at a time" in reply.failures[0].reason


def test_a_load_is_of_the_data() -> None:
    worker = Worker("clinic")
    clinic = hc.VirtualWorker(id="clinic")
    clinic.add("heart", x=X, y=Y, mock=MOCK, policy=Policy.open_to("me"))
    worker.catalogue, worker.gate = clinic.worker.catalogue, clinic.owner.gate
    session = worker.open("me")
    session.handle(Frame(1, (Mock("heart"), Load("heart", (1, 2)))))
    assert torch.equal(session.store[1], X)
    for number, name in enumerate(("heart.mock", "mock/heart", "heart#mock", "mock", "heart.", "HEART")):
        reply = session.handle(Frame(2 + number, (Load(name, (5, 6)), Mock(name))))
        assert len(reply.failures) == 2
        assert reply.results == ()


# -- on disk ------------------------------------------------------------------------------------------------------


def mocks(folder: Path) -> list[Path]:
    return sorted((folder / "data").glob("*.mock.safetensors"))


def test_a_mock_survives_and_goes_with_its_data(tmp_path: Path) -> None:
    Catalogue(tmp_path).add("heart", {"x": X, "y": Y}, mock=MOCK)
    again = Catalogue(tmp_path)
    assert again.owned("heart").mock == 3
    assert all(torch.equal(again.mock("heart")[name], MOCK[name]) for name in MOCK)
    again.check("heart")
    Catalogue(tmp_path).add("heart", {"x": X, "y": Y}, mock=Fakes(5, y=3), replace=True)
    assert again.owned("heart").mock == len(again.mock("heart")["x"]) == 5
    assert len(mocks(tmp_path)) == 1
    Catalogue(tmp_path).add("heart", {"x": X, "y": Y}, replace=True)
    assert mocks(tmp_path) == []
    with pytest.raises(hc.DataError, match="data set 'heart' has no mock"):
        again.mock("heart")
    Catalogue(tmp_path).add("heart", {"x": X, "y": Y}, mock=MOCK, replace=True)
    again.remove("heart")
    assert list((tmp_path / "data").iterdir()) == []
    with pytest.raises(hc.DataError, match="no data set 'heart'"):
        again.mock("heart")


def test_names_that_look_like_a_mocks_files(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path)
    catalogue.add("a", {"x": X}, mock=Fakes(2))
    inner = mocks(tmp_path)[0].name.removesuffix(".safetensors")  # a.DIGEST.mock
    for name in ("a.mock", inner):
        catalogue.add(name, {"x": X + 1}, mock=Fakes(3))
    catalogue.add("a", {"x": X + 2}, mock=Fakes(4), replace=True)
    catalogue.remove("a")
    for name in ("a.mock", inner):
        catalogue.check(name)
        assert len(catalogue.mock(name)["x"]) == 3
        assert torch.equal(catalogue.columns(name)["x"], X + 1)


def test_the_datas_file_in_the_place_of_the_mocks_is_not_served(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path)
    catalogue.add("heart", {"x": X}, mock=Fakes(10))
    (elements,) = set((tmp_path / "data").glob("*.safetensors")) - set(mocks(tmp_path))
    shutil.copy(elements, mocks(tmp_path)[0])
    for serve in (catalogue.mock, catalogue.check):
        with pytest.raises(hc.DataError, match=r"mock of data set 'heart' is damaged: .* not the file that was added"):
            serve("heart")
    assert torch.equal(catalogue.columns("heart")["x"], X)
    mocks(tmp_path)[0].unlink()
    with pytest.raises(hc.DataError, match="'heart' has lost its mock: add it again"):
        catalogue.mock("heart")


class Crash(BaseException):
    """Nobody catches it."""


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_crash_leaves_the_old_mock_with_the_old_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    catalogue = Catalogue(tmp_path)
    catalogue.add("heart", {"x": X}, mock=Fakes(2))
    replace, calls = module.os.replace, []

    def crash(*args: Any) -> None:
        calls.append(args)
        if len(calls) == at:
            raise Crash
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", crash)
        with pytest.raises(Crash):
            Catalogue(tmp_path).add("heart", {"x": X + 1}, mock=Fakes(3), replace=True)
    for known in (catalogue, Catalogue(tmp_path)):
        assert torch.equal(known.columns("heart")["x"], X)
        assert len(known.mock("heart")["x"]) == 2
    Catalogue(tmp_path).add("heart", {"x": X + 1}, mock=Fakes(3), replace=True)
    assert len(list((tmp_path / "data").iterdir())) == 3
    assert len(catalogue.mock("heart")["x"]) == 3


@pytest.mark.parametrize(
    ("old", "new"),
    [("count = 2", "count = 0"), ('sha256 = "', 'sha256 = "../'), ("[mock]", "[mock]\nname = 'heart'")],
)
def test_a_damaged_description_of_a_mock(tmp_path: Path, old: str, new: str) -> None:
    Catalogue(tmp_path).add("heart", {"x": X}, mock=Fakes(2))
    path = tmp_path / "data" / "heart.toml"
    head, mock = path.read_text().split("[mock]")
    path.write_text(head + ("[mock]" + mock).replace(old, new, 1))
    assert "heart" in Catalogue(tmp_path).damaged()


def test_a_mock_of_another_count_than_described(tmp_path: Path) -> None:
    Catalogue(tmp_path).add("heart", {"x": X}, mock=Fakes(2))
    path = tmp_path / "data" / "heart.toml"
    head, mock = path.read_text().split("[mock]")
    path.write_text(head + "[mock]" + mock.replace("count = 2", "count = 5"))
    with pytest.raises(hc.DataError, match="'x' is not of the type described"):
        Catalogue(tmp_path).mock("heart")


def test_looking_for_mocks_makes_no_slots(clinic: Any) -> None:
    clinic.add("slots", x=X, mock=Fakes(4))
    session: Session = clinic.session
    session.wait()
    held = len(session.marks)
    _ = clinic.dataset("slots").mock()
    assert len(session.marks) == held
