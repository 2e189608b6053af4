"""The catalogue: what an owner registered is there whole or not at all, found by name and tag, and never guessed."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

import housecall as hc
from housecall.errors import DataError, UsageError
from housecall.owned import catalogue as module
from housecall.owned.catalogue import Catalogue, Owned
from housecall.owned.mocks import Fakes
from housecall.owner.policies import POLICY_FOLDER, Policies, draft, sign
from housecall.owner.policy import Policy
from housecall.owner.signing import OwnerKey
from housecall.types import TensorType
from housecall.wire.codec import ITEM_BYTES

NOON = datetime(2030, 1, 2, 12, 0, 0, 5, tzinfo=UTC)


@pytest.fixture
def kept(tmp_path: Path) -> Catalogue:
    return Catalogue(tmp_path, clock=lambda: NOON)


def digits(count: int = 6) -> dict[str, torch.Tensor]:
    return {"x": torch.arange(count * 4, dtype=torch.uint8).reshape(count, 2, 2), "y": torch.arange(count)}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "data").iterdir())


# -- what is added is found -----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_a_data_set_is_described_and_its_columns_come_back(tmp_path: Path, where: str) -> None:
    catalogue = Catalogue(tmp_path, clock=lambda: NOON)
    put = catalogue.add if where == "disk" else catalogue.register
    owned = put(
        "mnist", digits(), ["#mnist", "#digits"], 'by "hand"\n', classes={"y": ("a", "é")}, sources={"x": ("p",)}
    )
    expected = Owned(
        "mnist",
        {"x": TensorType("uint8", (2, 2), (2, 1)), "y": TensorType("int64", (), ())},
        6,
        ("#mnist", "#digits"),
        'by "hand"\n',
        NOON.replace(microsecond=0),
        {"y": ("a", "é")},
        {"x": ("p",)},
    )
    for other in (catalogue, Catalogue(tmp_path)) if where == "disk" else (catalogue,):
        assert owned == other.owned("mnist") == expected
        assert other.names() == ("mnist",)
        columns = other.columns("mnist")
        assert all(torch.equal(columns[name], tensor) for name, tensor in digits().items())
        assert all(columns[name].data_ptr() == tensor.data_ptr() for name, tensor in other.columns("mnist").items())
        other.check("mnist")


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_every_dtype_that_travels_is_stored(kept: Catalogue, dtype: str) -> None:
    kind: Any = getattr(torch, dtype)
    values = torch.tensor([[0, 1], [1, 1], [1, 0]], dtype=torch.float32).to(kind)
    if kind.is_complex:
        values = (values.to(torch.complex64) * 1j).conj().to(kind)
    kept.add("a", {"x": values, "again": values, "row": values[:, 1]})
    assert kept.owned("a").columns["x"].dtype == dtype
    back = kept.columns("a")
    for name, expected in {"x": values, "again": values, "row": values[:, 1]}.items():
        assert back[name].dtype == kind
        assert back[name].to(torch.complex64).tolist() == expected.to(torch.complex64).tolist()


def test_search_is_by_all_tags(kept: Catalogue) -> None:
    kept.add("b", digits(), ["#dna", "#old"])
    kept.add("a", digits(), ["#dna"])
    kept.register("c", digits(), "#old")
    assert [owned.name for owned in kept.search("#dna")] == ["a", "b"]
    assert [owned.name for owned in kept.search("#dna", "#old")] == ["b"]
    assert [owned.name for owned in kept.search()] == ["a", "b", "c"]
    assert kept.search("#none") == ()


def test_an_unknown_name_is_answered_with_close_ones(kept: Catalogue) -> None:
    kept.add("mnist", digits())
    for ask in (kept.owned, kept.columns, kept.check, kept.remove):
        with pytest.raises(DataError, match=r"no data set 'mnits'; did you mean mnist\?"):
            ask("mnits")
    with pytest.raises(DataError) as error:
        kept.owned("x" * 1000)
    assert len(str(error.value)) < 100


def test_only_this_user_reads_the_folder(kept: Catalogue, tmp_path: Path) -> None:
    kept.add("a", digits())
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "data").iterdir()} == {0o600}


def test_big_columns_are_mapped_not_read(kept: Catalogue, tmp_path: Path) -> None:
    kept.add("big", {"x": torch.zeros(64 << 20, dtype=torch.uint8)})
    before = own_memory()
    assert Catalogue(tmp_path).columns("big")["x"].sum() == 0
    assert own_memory() - before < 16 << 20


def own_memory() -> int:
    """Bytes of memory that are this process's alone, in contrast to pages of files."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    own = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return int(own[0]) << 10 if own else pytest.skip("this system does not say what is in memory")


def test_writing_to_a_column_does_not_reach_the_file(kept: Catalogue) -> None:
    kept.add("a", digits())
    kept.columns("a")["y"].add_(1)
    kept.check("a")


# -- what is unfit is refused ---------------------------------------------------------------------------------

OK = {"x": torch.ones(2)}


@pytest.mark.parametrize("where", ["disk", "memory"])
@pytest.mark.parametrize(
    ("name", "columns", "tags", "reason"),
    [
        ("", OK, (), "name '' must be"),
        ("../a", OK, (), "must be 1 to 63"),
        (".a", OK, (), "must be 1 to 63"),
        ("a/b", OK, (), "must be 1 to 63"),
        ("a\n", OK, (), "must be 1 to 63"),
        ("é", OK, (), "must be 1 to 63"),
        ("a" * 64, OK, (), "must be 1 to 63"),
        ("a", OK, ("dna",), "tag 'dna' must be '#'"),
        ("a", OK, ("#",), "tag '#' must be"),
        ("a", OK, ("#a b",), "tag '#a b' must be"),
        ("a", {}, (), "has no columns"),
        ("a", {"x": torch.ones(2), "y": torch.ones(3)}, (), "'x' has 2, 'y' has 3"),
        ("a", {"x": torch.ones(0, 3)}, (), r"column 'x' of data set 'a' is empty: its shape is \(0, 3\)"),
        ("a", {"x": torch.ones(3, 0)}, (), "is empty"),
        ("a", {"x": torch.tensor(1.0)}, (), "is a single value"),
        ("a", {"": torch.ones(2)}, (), "column name ''"),
        ("a", {"__metadata__": torch.ones(2)}, (), "column name '__metadata__'"),
        ("a", {"a\n": torch.ones(2)}, (), "column name"),
        ("a", {"x": [1, 2]}, (), "column 'x' is a list, expected a torch tensor"),
        ("a", {"x": torch.ones(2).to_sparse()}, (), "expected a dense tensor"),
        ("a", {"x": torch.ones(2, device="meta")}, (), "expected a dense tensor"),
    ],
)
def test_unfit_data_sets(
    tmp_path: Path, where: str, name: str, columns: dict[str, Any], tags: tuple[str, ...], reason: str
) -> None:
    catalogue = Catalogue(tmp_path)
    with pytest.raises(UsageError, match=reason):
        (catalogue.add if where == "disk" else catalogue.register)(name, columns, tags)
    assert catalogue.names() == ()
    assert not (tmp_path / "data").exists()


def test_pointers_are_no_data(kept: Catalogue, clinic: hc.VirtualWorker) -> None:
    with pytest.raises(UsageError, match="is a PointerTensor, expected a torch tensor"):
        kept.add("a", {"x": torch.ones(2).send(clinic)})  # type: ignore[attr-defined]  # the hook adds it


def test_descriptions_are_printable(kept: Catalogue) -> None:
    for description in ("\x1b[2J", "\udc80", "x" * 10_001):
        with pytest.raises(UsageError, match="must be printable text"):
            kept.add("a", digits(), description=description)


def test_a_name_is_taken_unless_it_is_replaced(kept: Catalogue, tmp_path: Path) -> None:
    kept.add("a", digits(6))
    kept.register("m", digits(6))
    for put, name in ((kept.add, "a"), (kept.register, "m"), (kept.register, "a")):
        with pytest.raises(UsageError, match="already: choose another name"):
            put(name, digits(7))
    old = kept.columns("a")["y"]
    kept.add("a", digits(8), replace=True)
    kept.register("m", digits(8), replace=True)
    assert kept.owned("a").count == kept.owned("m").count == 8
    assert len(kept.columns("a")["y"]) == len(kept.columns("m")["y"]) == 8
    assert old.tolist() == list(range(6))  # who still holds the old elements keeps them
    assert len(files(tmp_path)) == 2
    with pytest.raises(UsageError, match="lies on disk"):
        kept.register("a", digits(), replace=True)
    with pytest.raises(UsageError, match="is registered in memory"):
        kept.add("m", digits(), replace=True)


def test_without_a_folder_nothing_is_stored() -> None:
    with pytest.raises(UsageError, match="has no folder: use register"):
        Catalogue().add("a", digits())


# -- whole, or not at all -------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process ends here."""


def crash_at(number: int, error: BaseException | None = None) -> Callable[..., None]:
    """An `os.replace` that never does its `number`-th."""
    replace = os.replace
    done = [0]

    def crashing(source: Any, target: Any) -> None:
        done[0] += 1
        if done[0] == number:
            raise error or Crash
        replace(source, target)

    return crashing


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("swept", [True, False])
def test_a_crash_leaves_the_old_state(
    kept: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, swept: bool
) -> None:
    kept.add("a", digits(6), ["#old"])
    before = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", crash_at(number))
        if not swept:  # as kill -9: nobody cleans up
            patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        with pytest.raises(Crash):
            kept.add("a", digits(8), replace=True)
        patch.setattr(module.os, "replace", crash_at(number))
        with pytest.raises(Crash):
            kept.add("new", digits(8))
    assert swept == (files(tmp_path) == before)
    for catalogue in (kept, Catalogue(tmp_path)):
        assert catalogue.names() == ("a",)
        assert catalogue.owned("a").tags == ("#old",)
        assert len(catalogue.columns("a")["y"]) == 6
        catalogue.check("a")
    kept.add("a", digits(9), replace=True)
    kept.add("new", digits(9))
    assert len(files(tmp_path)) == 4  # and what the crash left is gone


@pytest.mark.parametrize("number", [1, 2])
def test_a_full_disk_is_a_data_error(
    kept: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(module.os, "replace", crash_at(number, full))
    with pytest.raises(DataError, match=r"data set 'a' was not stored: .*No space left"):
        kept.add("a", digits())
    assert kept.names() == ()
    assert files(tmp_path) == []


def test_an_interrupt_just_behind_the_commit_loses_nothing(kept: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.add("a", digits(6))
    replace = os.replace

    def interrupted(source: Any, target: Any) -> None:
        replace(source, target)
        if str(target).endswith(".toml"):
            raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kept.add("a", digits(8), replace=True)
    assert len(kept.columns("a")["y"]) == 8
    kept.check("a")


def test_a_failure_keeps_the_elements_of_a_damaged_description(
    kept: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.add("a", digits(6))
    description = tmp_path / "data" / "a.toml"
    content = description.read_text()
    description.write_text("?")
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", crash_at(2))
        with pytest.raises(Crash):
            kept.add("a", digits(8), replace=True)
    description.write_text(content)
    kept.check("a")


def test_names_that_begin_alike_do_not_sweep_each_other(kept: Catalogue) -> None:
    kept.add("a", digits(1))
    digest = next(iter(files(kept.folder.parent)))  # type: ignore[union-attr]  # it has a folder
    kept.add(digest.removesuffix(".safetensors"), digits(2))
    kept.add("a.b", digits(3))
    kept.add("a", digits(4), replace=True)
    kept.remove("a")
    assert len(kept.names()) == 2
    for name in kept.names():
        kept.check(name)


# -- other processes ------------------------------------------------------------------------------------------


def test_what_another_process_does_is_seen(kept: Catalogue, tmp_path: Path) -> None:
    assert kept.names() == ()
    code = (
        "import sys, torch\nfrom housecall.owned.catalogue import Catalogue\n"
        "Catalogue(sys.argv[1]).add('a', {'y': torch.arange(5)}, ['#far'])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert [owned.name for owned in kept.search("#far")] == ["a"]
    assert kept.columns("a")["y"].tolist() == list(range(5))
    other = Catalogue(tmp_path)
    other.add("a", {"y": torch.arange(7)}, replace=True)
    assert kept.owned("a").count == 7
    assert len(kept.columns("a")["y"]) == 7
    other.remove("a")
    assert kept.names() == ()
    with pytest.raises(DataError, match="no data set 'a'"):
        kept.columns("a")


def test_what_is_registered_here_goes_first(kept: Catalogue, tmp_path: Path) -> None:
    kept.register("a", digits(3))
    Catalogue(tmp_path).add("a", digits(5))
    assert kept.owned("a").count == 3
    kept.remove("a")
    assert kept.owned("a").count == 5


def test_elements_replaced_between_scan_and_load(
    kept: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.add("a", digits(3))
    load = module._load

    def late(path: Path, owned: Owned) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(module, "_load", load)
        Catalogue(tmp_path).add("a", digits(5), replace=True)
        return load(path, owned)

    monkeypatch.setattr(module, "_load", late)
    assert len(kept.columns("a")["y"]) == 5


def test_two_processes_cannot_take_one_name(tmp_path: Path) -> None:
    code = (
        "import sys, torch\nfrom housecall.owned.catalogue import Catalogue\n"
        "sys.stdin.readline()\nCatalogue(sys.argv[1]).add('a', {'y': torch.full((200_000,), int(sys.argv[2]))})"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(number)], stdin=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for number in (1, 2)
    ]
    for process in running:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
    errors = [process.communicate()[1] for process in running]
    assert sorted(process.returncode for process in running) == [0, 1]
    assert b"there is a data set 'a' already" in b"".join(errors)
    Catalogue(tmp_path).check("a")
    assert len(files(tmp_path)) == 2


# -- damage ---------------------------------------------------------------------------------------------------


def elements(folder: Path) -> Path:
    return next((folder / "data").glob("*.safetensors"))


def _flip(folder: Path) -> None:
    path = elements(folder)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _swap(folder: Path) -> None:
    Catalogue(folder / "other").add("a", {"x": torch.ones(6, 3)})
    elements(folder).write_bytes(elements(folder / "other").read_bytes())


def test_a_changed_element_is_found_by_check(kept: Catalogue, tmp_path: Path) -> None:
    kept.add("a", digits())
    _flip(tmp_path)
    with pytest.raises(DataError, match=r"data set 'a' is damaged: .* has SHA-256 .* was added"):
        kept.check("a")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (_swap, "other columns than described"),
        (lambda folder: elements(folder).write_bytes(b"short"), "is damaged"),
        (lambda folder: elements(folder).unlink(), "has lost its elements|cannot be read"),
    ],
)
def test_elements_that_are_not_those_described(
    tmp_path: Path, kept: Catalogue, harm: Callable[[Path], Any], reason: str
) -> None:
    kept.add("a", digits())
    harm(tmp_path)
    with pytest.raises(DataError, match=reason):
        kept.columns("a")
    with pytest.raises(DataError):
        kept.check("a")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("count = 6", "count = 0", "at least one record"),
        ("count = 6", "count = 'six'", r"Expected `int`, got `str` - at `\$\.count`"),
        ("count = 6", "count = 6\nowner = 1", "unknown field `owner`"),
        ('"uint8"', '"qint8"', "column 'x' has no type that travels"),
        ('"uint8"', '"builtins.eval"', "column 'x' has no type that travels"),
        ('sha256 = "', 'sha256 = "../', "sha256 is no SHA-256"),
        ('"#old"', '"old"', "a tag is '#'"),
        ("count = 6", "count = ", "Invalid value"),
        ("# A", "\udcff", "can't decode byte"),
    ],
)
def test_a_damaged_description_harms_no_other_set(
    kept: Catalogue, tmp_path: Path, old: str, new: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept.add("a", digits(), ["#old"])
    kept.add("b", digits())
    path = tmp_path / "data" / "a.toml"
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1), errors="surrogateescape")
    assert kept.names() == ("b",)
    with pytest.raises(DataError, match="data set 'a' cannot be used: its description is damaged"):
        kept.owned("a")
    assert list(kept.damaged()) == ["a"]
    assert re.search(reason, kept.damaged()["a"])
    assert len(caplog.records) == 1
    with pytest.raises(UsageError, match="already"):
        kept.add("a", digits())
    kept.remove("a")
    assert files(tmp_path) == [path.name for path in sorted((tmp_path / "data").glob("b.*"))]


def test_a_description_that_disagrees_with_the_elements(kept: Catalogue, tmp_path: Path) -> None:
    kept.add("a", digits())
    path = tmp_path / "data" / "a.toml"
    for old, new in (("count = 6", "count = 7"), ('"uint8"', '"int8"')):
        content = path.read_text()
        path.write_text(content.replace(old, new, 1))
        with pytest.raises(DataError, match="is not of the type described"):
            kept.columns("a")
        path.write_text(content)
    assert len(kept.columns("a")) == 2


def test_other_files_in_the_folder_are_no_data_sets(kept: Catalogue, tmp_path: Path) -> None:
    kept.add("a", digits())
    for name in (".hidden.toml", "notes.txt", "-x.toml", "a b.toml"):
        (tmp_path / "data" / name).write_text("x = 1")
    assert kept.names() == ("a",)
    assert kept.damaged() == {}


# -- whose records they are, and what is signed for them -------------------------------------------------------


def test_a_person_column_is_kept_and_withheld(kept: Catalogue, tmp_path: Path) -> None:
    owned = kept.add("visits", {**digits(), "subject": torch.arange(6) // 2}, unit="person", person="subject")
    assert (owned.unit, list(owned.columns), list(owned.withheld)) == ("person", ["x", "y"], ["subject"])
    for other in (kept, Catalogue(tmp_path)):
        assert other.owned("visits") == owned
        assert list(other.columns("visits")) == ["x", "y"]
        assert other.persons("visits").tolist() == [0, 0, 1, 1, 2, 2]
        other.check("visits")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('person = "subject"', 'person = "nobody"'),
        ('person = "subject"', ""),
        ('unit = "person"', ""),
        ('unit = "person"', 'unit = "people"'),
        ('person = "subject"', 'person = "x"'),
    ],
)
def test_a_description_that_offers_what_is_withheld(kept: Catalogue, tmp_path: Path, old: str, new: str) -> None:
    kept.add("visits", {**digits(), "subject": torch.arange(6)}, unit="person", person="subject")
    path = tmp_path / "data" / "visits.toml"
    path.write_text(path.read_text().replace(old, new, 1))
    assert kept.names() == ()
    assert list(kept.damaged()) == ["visits"]


@pytest.fixture
def signed(kept: Catalogue, tmp_path: Path) -> Callable[[], bool]:
    """Whether the policy of "a", signed once for it, is in force."""
    key = OwnerKey.create(tmp_path)
    kept.add("a", digits())
    (tmp_path / POLICY_FOLDER).mkdir()
    (tmp_path / POLICY_FOLDER / "a.toml").write_text(Policy.open_to("alice").text())
    sign(tmp_path, draft(tmp_path, "a", key.public), key)
    policies = Policies(tmp_path, key.public)  # a worker's, which runs meanwhile
    return lambda: policies["a"].use.interactive == ("alice",)


def test_the_same_data_keeps_its_policy(kept: Catalogue, signed: Callable[[], bool]) -> None:
    before = kept.identity("a")
    kept.add("a", digits(), ["#tagged"], mock=Fakes(3, x=(0, 9), y=9), replace=True)
    assert signed()
    assert kept.identity("a") == before


@pytest.mark.parametrize(
    "change",
    [
        lambda catalogue: catalogue.add("a", digits(7), replace=True),
        lambda catalogue: catalogue.add("a", digits(), unit="person", person="y", replace=True),
        lambda catalogue: (catalogue.remove("a"), catalogue.add("a", digits(7))),
        lambda catalogue: (catalogue.remove("a"), catalogue.add("a", digits())),
    ],
    ids=["other data", "another unit", "removed, and other data", "removed"],
)
def test_other_data_needs_the_signature_again(
    kept: Catalogue, tmp_path: Path, signed: Callable[[], bool], change: Callable[[Catalogue], Any]
) -> None:
    assert signed()
    old = (tmp_path / POLICY_FOLDER / "a.signed").read_bytes()
    change(kept)
    assert not signed()
    (tmp_path / POLICY_FOLDER / "a.signed").write_bytes(old)
    assert not signed()
    key = OwnerKey.load(tmp_path)
    made = draft(tmp_path, "a", key.public)
    assert made.policy.version > 1
    sign(tmp_path, made, key)
    assert signed()


def test_a_policy_goes_before_its_data_does(
    kept: Catalogue, signed: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash in between closes what was open, and never the other way round."""
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", crash_at(3))  # the description's; the second is of seen.json
        with pytest.raises(Crash):
            kept.add("a", digits(8), replace=True)
    assert len(kept.columns("a")["y"]) == 6
    assert not signed()


def test_damaged_policies_do_not_keep_data_from_being_replaced(kept: Catalogue, tmp_path: Path) -> None:
    kept.add("a", digits())
    (tmp_path / POLICY_FOLDER).mkdir()
    (tmp_path / POLICY_FOLDER / "a.signed").write_bytes(b"\xff?")
    kept.add("a", digits(8), replace=True)
    assert list((tmp_path / POLICY_FOLDER).glob("a.*")) == []
