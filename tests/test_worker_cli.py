"""`housecall worker init|add|list|remove|check`, as an owner types them, and the settings that `init` writes."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from housecall.cli import _catalogue
from housecall.cli.policy import app as policies
from housecall.cli.worker import app
from housecall.errors import DataError, HousecallError, PolicyError, UsageError
from housecall.host.config import CONFIG_FILE, Config, Identity, Limits, Sandbox
from housecall.owned.catalogue import Catalogue
from housecall.owner.policies import POLICY_FOLDER, standing
from housecall.owner.policy import Budget, Policy
from housecall.owner.signing import public_key
from housecall.service import Service


def run(*arguments: str | Path, fails: bool = False, answer: str | None = None) -> str:
    """What a command prints, its lines joined as far as tables wrap them. An error of ours is raised, as in `main`."""
    result: Result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(one) for one in arguments], input=answer)
    if isinstance(result.exception, Exception):
        raise result.exception
    assert (result.exit_code != 0) == fails, result.output
    return result.output


@pytest.fixture
def clinic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A worker's folder, which is where we are."""
    monkeypatch.chdir(tmp_path)
    run("init", "clinic")
    monkeypatch.chdir(tmp_path / "clinic")
    np.savez("digits.npz", x=np.arange(24, dtype=np.uint8).reshape(6, 2, 2), y=np.arange(6))
    (tmp_path / "clinic" / "people.csv").write_text("age,bmi,sex\n30,20.5,f\n40,?,m\n")
    return tmp_path / "clinic"


# -- init -----------------------------------------------------------------------------------------------------


def test_init_makes_a_folder_for_this_user_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = run("init", "clinic-1.a_b", "--listen", "0.0.0.0:7000")
    folder = tmp_path / "clinic-1.a_b"
    assert "Worker 'clinic-1.a_b' is in clinic-1.a_b, and will listen at 0.0.0.0:7000" in output
    assert Config.load(folder) == Config("clinic-1.a_b", "0.0.0.0:7000")
    for inner in ("identity", "data"):
        assert stat.S_IMODE((folder / inner).stat().st_mode) == 0o700
        assert list((folder / inner).iterdir()) == []
    assert Catalogue(folder).names() == ()


def test_folders_that_were_there_are_closed_to_others(tmp_path: Path) -> None:
    (tmp_path / "identity").mkdir(mode=0o755)
    run("init", "clinic", "--folder", tmp_path)
    assert stat.S_IMODE((tmp_path / "identity").stat().st_mode) == 0o700


def test_init_does_not_touch_another_worker(tmp_path: Path) -> None:
    run("init", "clinic", "--folder", tmp_path / "deep" / "place")
    before = (tmp_path / "deep" / "place" / CONFIG_FILE).read_text()
    with pytest.raises(UsageError, match=r"worker\.toml is there already: choose another name"):
        run("init", "school", "--folder", tmp_path / "deep" / "place")
    assert (tmp_path / "deep" / "place" / CONFIG_FILE).read_text() == before
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"is there already|cannot make a worker"):
        run("init", "school", "--folder", tmp_path / "file")


@pytest.mark.parametrize("name", ["", "a b", "a/b", "..", "é", "a" * 64, "a\n"])
def test_names_that_no_worker_has(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"worker init: name .* must be 1 to 63"):
        run("init", name, "--folder", tmp_path / "place")
    assert not (tmp_path / "place").exists()


# -- settings -------------------------------------------------------------------------------------------------


def test_settings_are_written_with_their_explanations(tmp_path: Path) -> None:
    config = Config.create(tmp_path, "clinic")
    content = (tmp_path / CONFIG_FILE).read_text()
    lines = content.splitlines()
    values = [index for index, line in enumerate(lines) if " = " in line and not line.startswith("#")]
    assert len(values) == sum(len(kind.__struct_fields__) for kind in (Config, Limits, Identity, Sandbox)) - 3
    assert all(lines[index - 1].startswith("# ") for index in values)
    assert Config.load(tmp_path) == config == Config("clinic")
    assert max(map(len, lines)) <= 120


def test_changed_settings_come_back() -> None:
    config = Config(
        "a", "[::1]:1", 3, "cuda:1", 1.5, 2.5, Limits(1, 2, 3, 4, 5.0, 6, 7, 8), Identity("i", "https://ca", "c")
    )
    assert Config.parse(config.text()) == config


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", r"worker\.toml: Object missing required field `name`"),
        ("name = 3", "Expected `str`, got `int` - at `name`"),
        ("name = 'a'\nthread = 1", "unknown field `thread`"),
        ("name = 'a'\n[limits]\nslot = 1", "unknown field `slot` - at `limits`"),
        ("name = 'a'\n[limits]\nslots = 0", "Expected `int` >= 1 - at `limits.slots`"),
        ("name = 'a'\n[limits]\nslots = '9'", "Expected `int`, got `str` - at `limits.slots`"),
        ("name = 'a'\n[limits]\nslots = 1.5", "got `float` - at `limits.slots`"),
        ("name = 'a'\nlease_s = inf", "at `lease_s`"),
        ("name = 'a'\nlease_s = nan", "at `lease_s`"),
        ("name = 'a'\nthreads = true", "Expected `int`, got `bool` - at `threads`"),
        ("name = 'a'\nthreads = -1", "at `threads`"),
        ("name = 'a'\ndevice = 'cuda:'", "device 'cuda:' must be"),
        ("name = 'a'\nlisten = '127.0.0.1'", "must be HOST:PORT"),
        ("name = 'a'\nlisten = 'a:65536'", "must be HOST:PORT"),
        ("name = 'a'\nlisten = '::1:7443'", "must be HOST:PORT"),
        ("name = 'a'\n[identity]\nfolder = ''", "at `identity.folder`"),
        ("name = 'a'\nname = 'b'", "Cannot overwrite"),
        ("name = ", "Invalid value"),
    ],
)
def test_settings_are_read_strictly(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / CONFIG_FILE).write_text(content)
    with pytest.raises(UsageError, match=reason) as error:
        Config.load(tmp_path)
    assert str(tmp_path / CONFIG_FILE) in str(error.value)


def test_settings_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no worker\.toml in .*: make a worker with `housecall worker init NAME`"):
        Config.load(tmp_path)
    (tmp_path / CONFIG_FILE).write_bytes(b"name = '\xff'")
    with pytest.raises(UsageError, match="cannot be read"):
        Config.load(tmp_path)
    assert isinstance(msgspec.structs.replace(Config("a"), threads=2), Config)


# -- add, list, remove, check ---------------------------------------------------------------------------------


def test_a_data_set_comes_and_goes(clinic: Path) -> None:
    output = run(
        "add", "mnist", "digits.npz", "--tags", "#mnist digits", "--tags", "a,b", "--description", "[b]small[/b]"
    )
    assert "uint8" in output
    assert "2 × 2" in output
    assert "6 records, tags #mnist #digits #a #b" in output
    owned = Catalogue(clinic).owned("mnist")
    assert owned.tags == ("#mnist", "#digits", "#a", "#b")
    assert owned.description == "[b]small[/b]"
    listed = run("list")
    assert all(text in listed for text in ("mnist", "x: uint8[2, 2]", "y: int64[]", "#digits", "[b]small[/b]"))
    assert run("check") == "mnist: whole\n"
    assert "Data set 'mnist' is removed" in run("remove", "mnist")
    assert "No data sets yet" in run("list")


def test_a_table_is_shown_as_it_will_be(clinic: Path) -> None:
    with pytest.raises(DataError, match="column 'bmi' misses a value in row 3"):
        run("add", "people", "people.csv", "--label", "sex")
    output = run(
        *("add", "people", "people.csv", "--label", "sex", "--missing", "nan"),
        *("--columns", "x=age,bmi", "--columns", "y=sex", "--dtype", "x=float32"),
    )
    assert "x is made of age, bmi" in output
    assert "y numbers f = 0, m = 1" in output
    x = next(line for line in output.splitlines() if " x " in line)
    assert [cell.strip() for cell in x.strip("│┃ ").split("│")] == ["x", "float32", "2", "20.5", "40", "1"]
    assert "--dtype" not in output
    owned = Catalogue(clinic).owned("people")
    assert owned.classes == {"y": ("f", "m")}
    assert owned.sources == {"x": ("age", "bmi")}


def test_a_column_with_a_comma_is_named_in_quotes(clinic: Path) -> None:
    (clinic / "a.csv").write_text('"carcinoma, NOS",age\n1,30\n')
    assert "x is made of age, carcinoma, NOS" in run("add", "a", "a.csv", "--columns", 'x=age, "carcinoma, NOS"')


# -- mocks, and whose records they are --------------------------------------------------------------------------


@pytest.fixture
def visits(clinic: Path) -> Path:
    """A table of visits, and one of made-up visits that has not all of its words."""
    (clinic / "visits.csv").write_text("pid,age,sex,ward\na,30,f,north\nb,40,m,east\na,31,f,east\n")
    (clinic / "fakes.csv").write_text("age,sex,ward\n50,m,north\n60,m,north\n")
    return clinic


TABLE = ("--columns", "x=age,sex", "--columns", "ward=ward", "--label", "sex", "--label", "ward")


def test_a_mock_is_read_as_the_data_is(visits: Path) -> None:
    output = run("add", "visits", "visits.csv", *TABLE, "--mock", "fakes.csv", "--dtype", "x=float32")
    assert "a mock of 2 records, for whoever finds the data set" in output
    assert "RECORDS OF THE DATA" not in output
    catalogue = Catalogue(visits)
    assert catalogue.columns("visits")["ward"].tolist() == [1, 0, 0]
    mock = catalogue.mock("visits")
    assert mock["ward"].tolist() == [1, 1]  # north, as in the data; the only ward of its file
    assert mock["x"].tolist() == [[50, 1], [60, 1]]
    assert mock["x"].dtype == torch.float32
    (line,) = [line for line in run("list").splitlines() if "visits" in line]
    assert [cell.strip() for cell in line.strip("│┃ ").split("│")][1:5] == ["3", "record", "x: float32[2]", "2"]
    assert run("check") == "visits: whole\n"


def test_a_mock_is_generated_of_what_is_public(visits: Path) -> None:
    ranges = ("--range", "x=0:90", "--range", "ward=2")
    output = run("add", "visits", "visits.csv", *TABLE, "--mock", "generated", "--mock-records", "500", *ranges)
    assert "a mock of 500 records" in output
    mock = Catalogue(visits).mock("visits")
    assert mock["x"].unique().tolist() == list(range(91))
    assert mock["ward"].unique().tolist() == [0, 1]


def test_whose_records_they_are_stays_with_the_owner(visits: Path) -> None:
    person = ("--columns", "who=pid", "--label", "pid", "--person", "who")
    output = run("add", "visits", "visits.csv", *TABLE, *person, "--mock", "fakes.csv")
    assert "who says whose record each is, and stays with you" in output
    catalogue = Catalogue(visits)
    assert (catalogue.owned("visits").unit, list(catalogue.owned("visits").columns)) == ("person", ["x", "ward"])
    assert list(catalogue.mock("visits")) == ["x", "ward"]
    assert catalogue.persons("visits").tolist() == [0, 1, 0]
    assert "person" in run("list")


def test_real_records_in_a_mock_are_counted(visits: Path) -> None:
    (visits / "fakes.csv").write_text("age,sex,ward\n30,f,north\n60,m,north\n30,f,east\n30,f,north\n")
    output = run("add", "visits", "visits.csv", *TABLE, "--mock", "fakes.csv")
    assert "2 OF THEM ARE RECORDS OF THE DATA, TOO" in output
    with pytest.raises(UsageError, match="would give away real records: it is the data itself"):
        run("add", "visits", "visits.csv", *TABLE, "--mock", "visits.csv", "--replace")


def test_without_a_mock_that_is_said(clinic: Path) -> None:
    assert "no mock: who finds it cannot try a program out" in run("add", "a", "digits.npz")
    assert "none" in run("list")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--mock", "generated"), r"column 'x' is uint8, .* --range x=0:9"),
        (("--mock", "generated", "--mock", "digits.npz"), "--mock generated stands alone"),
        (("--range", "x=0:1"), "pass --mock generated with them"),
        (("--mock", "digits.npz", "--mock-records", "3"), "pass --mock generated with them"),
        (("--mock", "generated", "--range", "x"), "--range x: expected a form such as y=0:2"),
        (("--mock", "generated", "--range", "x=a"), "--range x=a: expected a form such as x=0:1.5"),
        (("--mock", "generated", "--range", "x=1:2:3"), "--range x=1:2:3: expected a form"),
        (("--mock", "generated", "--range", "x=2:1"), r"\(least, greatest\).* found \(2, 1\)"),
        (("--mock", "generated", "--range", "z=0:1"), "a range is given for z, but 'mnist' has x, y"),
        (("--mock", "missing.npz"), "there is no file or folder missing.npz"),
        (("--mock", "digits.npz"), "it is the data itself"),
        (("--person", "z"), "no column 'z' for person="),
        (("--person", "x"), "expected one whole number a record"),
    ],
)
def test_mocks_and_units_that_cannot_be_meant(clinic: Path, options: tuple[str, ...], reason: str) -> None:
    with pytest.raises(HousecallError, match=reason):
        run("add", "mnist", "digits.npz", *options)
    assert Catalogue(clinic).names() == ()


def test_a_word_of_the_mock_that_the_data_has_not(visits: Path) -> None:
    (visits / "fakes.csv").write_text("age,sex,ward\n50,m,west\n")
    with pytest.raises(
        UsageError, match=r"'ward' of the mock has west, which the data has not: .* east = 0, north = 1"
    ):
        run("add", "visits", "visits.csv", *TABLE, "--mock", "fakes.csv")


def test_a_signed_policy_is_for_the_data_that_it_was_signed_for(clinic: Path) -> None:
    run("add", "a", "digits.npz")
    (clinic / POLICY_FOLDER).mkdir(exist_ok=True)
    policy = clinic / POLICY_FOLDER / "a.toml"
    policy.write_text(Policy.open_to("alice").text())
    CliRunner().invoke(policies, ["sign", "a", "--yes"])
    assert standing(clinic, "a", public_key(clinic))[1] == ""
    assert "Nothing is permitted" not in run("add", "a", "digits.npz", "--replace", "--tags", "new")
    assert standing(clinic, "a", public_key(clinic))[1] == ""
    said = "Nothing is permitted on 'a': its policy is not signed for this data."
    assert said in run("add", "a", "digits.npz", "--replace", "--columns", "y=y")
    assert "not signed" in standing(clinic, "a", public_key(clinic))[1]
    assert "Its policy counts no more; policies/a.toml stays" in run("remove", "a")
    assert policy.is_file()


def test_data_without_a_policy_is_told_of(clinic: Path) -> None:
    said = run("add", "a", "digits.npz")
    assert "Nobody may use 'a' yet: it has no policy. To begin with one: housecall worker policy show a\n" in said
    assert (clinic / POLICY_FOLDER).is_dir()  # `init` has made it
    (clinic / POLICY_FOLDER / "a.toml").write_text(Policy.deny().text())
    assert "its policy is not signed for this data" in run("add", "a", "digits.npz", "--replace")


def test_a_budget_by_record_is_not_signed_for_data_by_person(visits: Path) -> None:
    run("add", "visits", "visits.csv", *TABLE, "--columns", "who=pid", "--label", "pid", "--person", "who")
    (visits / POLICY_FOLDER).mkdir(exist_ok=True)
    policy = visits / POLICY_FOLDER / "visits.toml"
    policy.write_text(Policy(budget=Budget(epsilon=1.0)).text())
    result = CliRunner().invoke(policies, ["sign", "visits", "--yes"])
    assert isinstance(result.exception, PolicyError)
    assert "'visits' protects persons" in str(result.exception)
    policy.write_text(Policy(budget=Budget(epsilon=1.0, unit="person")).text())
    assert CliRunner().invoke(policies, ["sign", "visits", "--yes"]).exit_code == 0


def test_a_budget_that_does_not_fit_its_data_is_said(visits: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Wherever an owner looks: when she signs, checks policies, checks data, and when the worker starts."""
    run("add", "visits", "visits.csv", *TABLE)
    (visits / POLICY_FOLDER).mkdir(exist_ok=True)
    policy = visits / POLICY_FOLDER / "visits.toml"
    for unit, fits in (("person", False), ("record", True)):
        policy.write_text(Policy(budget=Budget(epsilon=1.0, unit=unit)).text())  # type: ignore[arg-type]  # one of the two
        signed = CliRunner().invoke(policies, ["sign", "visits", "--yes"])
        checked = CliRunner().invoke(policies, ["check"])
        whole = run("check")
        caplog.clear()
        Service(visits, listen="127.0.0.1:0", plaintext=True).close(1)
        for text in (signed.output, checked.output, whole, caplog.text):
            assert ("'visits' protects records, and the budget of its policy counts by person" in text) != fits
        assert checked.exit_code == (0 if fits else 1)
        assert ("ITS BUDGET PAYS FOR NOTHING" in checked.output) != fits
        assert whole.startswith("visits: whole\n")


def test_what_is_left_out_and_what_is_wide_is_said(clinic: Path) -> None:
    output = run("add", "people", "people.csv", "--columns", "x=bmi", "--missing", "nan")
    assert "left out: age, sex" in output
    assert "x is float64; models mostly are float32: --dtype x=float32" in output


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--columns", "x"), "--columns x: expected a form such as x=a,b,c"),
        (("--columns", "x=a,,b"), "expected a form such as"),
        (("--columns", "x=y", "--columns", "x=x"), "names one column twice"),
        (("--dtype", "=int8"), "expected a form such as x=float32"),
        (("--size", "28"), "--size 28: expected HEIGHTxWIDTH"),
        (("--tags", "#"), "tag '#' must be"),
        (("--columns", "z=q"), "no file has such a column; there are: x, y"),
    ],
)
def test_unfit_options(clinic: Path, options: tuple[str, ...], reason: str) -> None:
    with pytest.raises(HousecallError, match=reason):
        run("add", "mnist", "digits.npz", *options)
    assert Catalogue(clinic).names() == ()


def test_a_name_is_replaced_only_if_asked(clinic: Path) -> None:
    run("add", "a", "digits.npz")
    with pytest.raises(DataError, match="there is a data set 'a' already: choose another name, or pass --replace"):
        run("add", "a", "digits.npz", "--columns", "z=y")
    run("add", "a", "digits.npz", "--columns", "z=y", "--replace")
    assert list(Catalogue(clinic).owned("a").columns) == ["z"]


def test_an_owner_at_a_terminal_is_asked(clinic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        @staticmethod
        def isatty() -> bool:
            return True

    said: list[str] = []

    def confirm(answer: bool) -> Any:
        return lambda question: said.append(question) or answer

    monkeypatch.setattr(_catalogue.sys, "stdin", Terminal)  # CliRunner puts its own in place, so `_catalogue`'s is set
    monkeypatch.setattr(_catalogue, "sys", type("System", (), {"stdin": Terminal}))
    monkeypatch.setattr(_catalogue.typer, "confirm", confirm(False))
    assert "Nothing was stored." in run("add", "a", "digits.npz", fails=True)
    assert Catalogue(clinic).names() == ()
    run("add", "a", "digits.npz", "--yes")
    assert "Nothing was removed." in run("remove", "a", fails=True)
    assert len(said) == 2
    monkeypatch.setattr(_catalogue.typer, "confirm", confirm(True))
    run("add", "b", "digits.npz")
    run("remove", "a")
    assert Catalogue(clinic).names() == ("b",)


def test_damage_is_told_and_fails(clinic: Path) -> None:
    for name in ("a", "b", "c"):
        run("add", name, "digits.npz")
    (clinic / "data" / "a.toml").write_text("count = [x]")
    elements = next((clinic / "data").glob("b.*.safetensors"))
    elements.write_bytes(elements.read_bytes()[:-1] + b"\xff")
    output = run("check", fails=True)
    assert "a: a.toml: " in output
    assert "b: data set 'b' is damaged" in output
    assert "c: whole" in output
    assert run("check", "c") == "c: whole\n"
    assert "a is damaged: a.toml" in run("list")
    run("remove", "a")
    assert "no data set 'a'" in run("check", "a", fails=True)


def test_images_are_read_beside_a_bar(clinic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_catalogue, "_BAR_FROM", 1)
    for name in ("cat/a.png", "dog/b.png"):
        (clinic / "pets" / name).parent.mkdir(parents=True)
        Image.new("RGB", (4, 3)).save(clinic / "pets" / name)
    output = run("add", "pets", "pets", "--size", "2x2")
    assert "label numbers cat = 0, dog = 1" in output
    assert Catalogue(clinic).columns("pets")["image"].shape == (2, 3, 2, 2)


def test_a_command_needs_a_workers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clinic: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (("list",), ("check",), ("remove", "a"), ("add", "a", "clinic/digits.npz")):
        with pytest.raises(UsageError, match=r"no worker lives here \(there is no worker\.toml\): go to a worker's"):
            run(*command)
        with pytest.raises(UsageError, match="no worker lives in elsewhere"):
            run(*command, "--folder", "elsewhere")
    run("add", "a", "clinic/digits.npz", "--folder", "clinic")
    assert Catalogue(clinic).names() == ("a",)


@pytest.mark.parametrize(
    ("column", "shown"),
    [
        (torch.tensor([3, -1], dtype=torch.int64), ("-1", "3", 0)),
        (torch.tensor([2**64 - 1, 5], dtype=torch.uint64), ("5", str(2**64 - 1), 0)),
        (torch.tensor([True, False]), ("False", "True", 0)),
        (torch.tensor([float("nan"), 0.5], dtype=torch.bfloat16), ("0.5", "0.5", 1)),
        (torch.tensor([float("nan")] * 2), ("-", "-", 2)),
        (torch.tensor([1.0, 2.0]).to(torch.float8_e5m2), ("1", "2", 0)),
        (torch.tensor([1j]), ("-", "-", 0)),
    ],
)
def test_the_extent_of_a_column(column: torch.Tensor, shown: tuple[str, str, int], monkeypatch: Any) -> None:
    for step in (_catalogue._STEP_BYTES, 1):  # at once, and record by record
        monkeypatch.setattr(_catalogue, "_STEP_BYTES", step)
        assert _catalogue._extent(column) == shown


def test_help_loads_no_torch() -> None:
    code = "import sys\nimport housecall.cli.worker\nprint(sorted({'torch', 'numpy', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert "idx, safetensors, parquet" in run("add", "--help")
