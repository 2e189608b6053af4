"""Requests and approvals: one contract for the folder and the memory, and what no approval may be."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from at_once import at_once
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from typer import Typer
from typer.testing import CliRunner

from housecall.cli import requests as cli
from housecall.errors import HousecallError, LimitError, PolicyError, UsageError
from housecall.host.config import CONFIG_FILE
from housecall.owner.approvals import Approval, Request, Requests
from housecall.owner.policies import draft, sign
from housecall.owner.policy import Plans, Policy, Release, Use
from housecall.owner.signing import OwnerKey

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
KEY = OwnerKey.generate()
DIGEST = "a" * 64
PROGRAM = "program(x: float32[3]) {\n  %1 = sum(x)\n  return out=%1\n}"
SHOWN = hashlib.sha256(PROGRAM.encode()).hexdigest()


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["folder", "memory"])
def kept(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Requests:
    """The contract: every test that takes this holds for both."""
    return Requests(tmp_path if request.param == "folder" else None, KEY.public, clock=clock)


def asked(kept: Requests, **changes: Any) -> Request:
    given: dict[str, Any] = {
        "principal": "alice",
        "role": "scientist",
        "kind": "value",
        "data_sets": ("labs", "heart"),
        "digest": DIGEST,
        "program": PROGRAM,
        "reason": "for the paper",
    }
    return kept.ask(**(given | changes))


def spend(kept: Requests, **changes: Any) -> Approval | None:
    given: dict[str, Any] = {
        "principal": "alice",
        "role": "scientist",
        "kind": "value",
        "digest": DIGEST,
        "shown": SHOWN,
        "data_sets": ("heart", "labs"),
    }
    return kept.spend(**(given | changes))


# -- asking and answering ---------------------------------------------------------------------------------------


def test_a_request_waits_until_it_is_answered(kept: Requests, clock: Clock) -> None:
    first = asked(kept)
    clock.now += timedelta(seconds=1)
    second = asked(kept, digest="b" * 64, kind="program")
    assert kept.pending() == kept.all() == (first, second)
    assert kept.get(first.id) == first
    assert (first.status, first.when, first.data_sets) == ("pending", NOW, ("heart", "labs"))
    kept.approve(first.id, KEY, words="gladly")
    kept.deny(second.id, "it prints records")
    assert kept.pending() == ()
    assert (kept.get(first.id).status, kept.get(first.id).words) == ("approved", "gladly")
    assert (kept.get(second.id).status, kept.get(second.id).words) == ("denied", "it prints records")
    assert len(kept.all()) == 2


def test_the_same_question_waits_once(kept: Requests) -> None:
    first = asked(kept)
    assert asked(kept, reason="please", data_sets=("heart", "labs")) == first
    assert asked(kept, principal="bob") != first
    assert asked(kept, role="worker") != first
    kept.deny(first.id, "no")
    assert asked(kept).id != first.id  # she may ask again


def test_an_answer_is_given_once(kept: Requests) -> None:
    made = asked(kept)
    kept.approve(made.id, KEY)
    with pytest.raises(PolicyError, match="approved already"):
        kept.approve(made.id, KEY)
    kept.deny(made.id, "on second thought")
    with pytest.raises(PolicyError, match="denied already"):
        kept.deny(made.id, "no")
    with pytest.raises(PolicyError, match="denied already"):
        kept.approve(made.id, KEY)


def test_an_approval_can_be_withdrawn(kept: Requests) -> None:
    made = asked(kept)
    kept.approve(made.id, KEY, uses=5)
    assert spend(kept)
    kept.deny(made.id, "no more")
    assert spend(kept) is None


@pytest.mark.parametrize("name", ["", "x", "../../owner", "0" * 15, "0" * 16, "A" * 16, "a" * 16 + "\n", "a/b"])
def test_what_nobody_asked_is_not_there(kept: Requests, name: str) -> None:
    asked(kept)
    for use in (kept.get, lambda id_: kept.approve(id_, KEY), lambda id_: kept.deny(id_, "no")):
        with pytest.raises(PolicyError, match="there is no request"):
            use(name)


def test_anothers_request_is_as_if_it_were_not_there(kept: Requests) -> None:
    made = asked(kept)
    assert kept.get(made.id, "alice", "scientist") == made
    with pytest.raises(PolicyError) as other:
        kept.get(made.id, "bob", "scientist")
    with pytest.raises(PolicyError, match="there is no request"):
        kept.get(made.id, "alice", "worker")
    with pytest.raises(PolicyError) as missing:
        kept.get("0" * 16, "bob", "scientist")
    assert str(other.value).replace(made.id, "") == str(missing.value).replace("0" * 16, "")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"reason": "x" * 2001}, "the reason has 2,001 characters"),
        ({"reason": " \n"}, "needs a reason"),
        ({"reason": "a\x1b[2Jb"}, r"U\+001B"),
        ({"reason": "a\u202eb"}, r"U\+202E"),
        ({"reason": "a\ud800b"}, r"U\+D800"),
        ({"reason": "a\rb"}, r"U\+000D"),
        ({"program": "x" * 1_000_001}, "longer than 1,000,000 bytes"),
        ({"program": "é" * 500_001}, "longer than 1,000,000 bytes"),
        ({"program": "\x1b]0;hi\x07"}, r"U\+001B"),
        ({"principal": "al\x00ice"}, r"U\+0000"),
        ({"principal": "x" * 201}, "the principal has 201"),
        ({"data_sets": ()}, "nobody to ask"),
        ({"data_sets": ("a\nb\x07",)}, "a data set"),
        ({"digest": ""}, "nothing that can be asked for"),
        ({"digest": "a\n"}, "nothing that can be asked for"),
        ({"kind": "everything"}, "nothing that can be asked for"),
    ],
)
def test_what_an_owner_could_not_read_is_refused(kept: Requests, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        asked(kept, **changes)
    assert kept.all() == ()


def test_the_longest_that_may_be_asked(kept: Requests) -> None:
    made = asked(kept, reason="é" * 2000, program="é" * 500_000)
    assert kept.get(made.id) == made


def test_so_many_wait_and_no_more(tmp_path: Path, clock: Clock) -> None:
    for folder in (None, tmp_path):
        kept = Requests(folder, KEY.public, clock=clock, pending=3)
        made = [asked(kept, digest=f"{n:064}") for n in range(3)]
        with pytest.raises(LimitError, match="3 requests of 'alice' wait"):
            asked(kept)
        assert asked(kept, digest=f"{1:064}") == made[1]  # what waits already is no more
        asked(kept, principal="bob")
        kept.deny(made[0].id, "no")
        asked(kept)


def test_ids_are_never_used_again(tmp_path: Path, clock: Clock) -> None:
    for folder in (None, tmp_path):
        numbers = iter(["1" * 16, "1" * 16, "2" * 16])
        kept = Requests(folder, KEY.public, clock=clock, new_id=lambda numbers=numbers: next(numbers))
        assert asked(kept).id == "1" * 16
        assert asked(kept, principal="bob").id == "2" * 16


# -- approvals --------------------------------------------------------------------------------------------------


def test_an_approval_is_used_once(kept: Requests) -> None:
    made = asked(kept)
    assert spend(kept) is None
    approval = kept.approve(made.id, KEY)
    assert spend(kept) == approval
    assert spend(kept) is None
    assert (approval.uses, approval.expires, approval.id) == (1, NOW + timedelta(hours=24), made.id)


def test_an_approval_is_used_as_often_as_it_says(kept: Requests) -> None:
    kept.approve(asked(kept).id, KEY, uses=3)
    assert [spend(kept) is not None for _ in range(5)] == [True] * 3 + [False] * 2


def test_two_approvals_are_two(kept: Requests, clock: Clock) -> None:
    later = kept.approve(asked(kept).id, KEY, expires=NOW + timedelta(hours=2))
    sooner = kept.approve(asked(kept).id, KEY, expires=NOW + timedelta(hours=1))
    assert [spend(kept), spend(kept), spend(kept)] == [sooner, later, None]


@pytest.mark.parametrize(
    "changes",
    [
        {"principal": "bob"},
        {"principal": "Alice"},
        {"role": "worker"},
        {"role": ""},
        {"kind": "program"},
        {"digest": "b" * 64},
        {"digest": DIGEST[:-1]},
        {"data_sets": ("heart",)},
        {"data_sets": ("heart", "labs", "xrays")},
        {"data_sets": ("heart", "xrays")},
        {"data_sets": ()},
    ],
)
def test_an_approval_is_for_just_that(kept: Requests, changes: dict[str, Any]) -> None:
    kept.approve(asked(kept).id, KEY)
    assert spend(kept, **changes) is None
    assert spend(kept) is not None  # and was not used up by the attempt


def test_an_approval_ends(kept: Requests, clock: Clock) -> None:
    kept.approve(asked(kept).id, KEY, uses=2, expires=NOW + timedelta(hours=1))
    clock.now = NOW + timedelta(hours=1) - timedelta(microseconds=1)
    assert spend(kept)
    clock.now = NOW + timedelta(hours=1)
    assert spend(kept) is None
    assert spend(kept, now=NOW)


@pytest.mark.parametrize("uses", [0, -1, 1_000_001, True, 1.0])
def test_strange_uses_are_refused(kept: Requests, uses: Any) -> None:
    with pytest.raises(UsageError, match="1 to 1,000,000 times"):
        kept.approve(asked(kept).id, KEY, uses=uses)
    assert spend(kept) is None


@pytest.mark.parametrize("expires", [NOW, NOW - timedelta(1), datetime(2030, 1, 1)])  # what is refused
def test_strange_ends_are_refused(kept: Requests, expires: datetime) -> None:
    with pytest.raises(UsageError, match="after now"):
        kept.approve(asked(kept).id, KEY, expires=expires)


def test_another_key_approves_nothing(kept: Requests) -> None:
    made = asked(kept)
    with pytest.raises(PolicyError, match="would not count"):
        kept.approve(made.id, OwnerKey.generate())
    assert kept.get(made.id).status == "pending"
    assert spend(kept) is None


# -- races ------------------------------------------------------------------------------------------------------


def test_of_threads_at_once_as_many_have_it_as_it_says(kept: Requests) -> None:
    kept.approve(asked(kept).id, KEY, uses=3)
    had: list[Approval | None] = []

    at_once(*[lambda: had.append(spend(kept))] * 8)
    assert len(had) == 8
    assert sum(approval is not None for approval in had) == 3


def test_uses_in_memory_are_counted_one_at_a_time(clock: Clock) -> None:
    kept = Requests(None, KEY.public, clock=clock)
    kept.approve(asked(kept).id, KEY)
    shelf: Any = kept._shelf
    write, held = shelf.write, []
    shelf.write = lambda name, data: (held.append(shelf._lock.locked()), write(name, data))
    assert spend(kept)
    assert asked(kept, principal="bob")
    assert held == [True, True]


def _in_a_process(folder: str, public: bytes, start: Any, results: Any) -> None:
    kept = Requests(folder, public, clock=lambda: NOW)
    start.wait()
    results.put(sum(spend(kept) is not None for _ in range(20)))


def test_of_processes_at_once_as_many_have_it_as_it_says(tmp_path: Path) -> None:
    kept = Requests(tmp_path, KEY.public, clock=lambda: NOW)
    kept.approve(asked(kept).id, KEY, uses=25)
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=_in_a_process, args=(str(tmp_path), KEY.public, start, results)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    counts = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sum(counts) == 25


# -- the folder -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, clock: Clock) -> Requests:
    return Requests(tmp_path, KEY.public, clock=clock)


def restarted(place: Path) -> Requests:
    return Requests(place, KEY.public, clock=lambda: NOW)


def test_files_are_for_this_user_alone(tmp_path: Path, folder: Requests) -> None:
    folder.approve(asked(folder).id, KEY)
    assert spend(folder)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".json"]) == 3
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o700 for path in tmp_path.rglob("*") if path.is_dir())


def test_all_survives_a_restart(tmp_path: Path, folder: Requests) -> None:
    made = asked(folder)
    assert restarted(tmp_path).pending() == (made,)
    folder.approve(made.id, KEY)
    other = asked(folder, principal="bob")
    again = restarted(tmp_path)
    assert again.pending() == (other,)
    assert spend(again)
    assert spend(folder) is None
    assert spend(restarted(tmp_path)) is None


def test_the_owner_answers_from_another_process(tmp_path: Path, folder: Requests) -> None:
    made = asked(folder)
    assert spend(folder) is None
    restarted(tmp_path).approve(made.id, KEY)
    assert folder.get(made.id).status == "approved"
    assert spend(folder)


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80])
def test_no_byte_of_an_approval_can_be_changed(tmp_path: Path, folder: Requests, flip: int) -> None:
    made = folder.approve(asked(folder).id, KEY)
    path = tmp_path / "approvals" / f"{made.id}.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
        assert spend(restarted(tmp_path)) is None, at
        path.write_bytes(whole[:at])
        assert spend(restarted(tmp_path)) is None, at
    path.write_bytes(whole)
    assert spend(restarted(tmp_path)) == made


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("principal", "bob"),
        ("role", "worker"),
        ("kind", "program"),
        ("data_sets", ["heart"]),
        ("digest", "b" * 64),
        ("uses", 1000),
        ("expires", "2036-01-01T00:00:00Z"),
        ("signature", ""),
        ("signature", "00" * 64),
    ],
)
def test_no_field_of_an_approval_can_be_changed(tmp_path: Path, folder: Requests, field: str, value: Any) -> None:
    made = folder.approve(asked(folder).id, KEY)
    path = tmp_path / "approvals" / f"{made.id}.json"
    held = json.loads(path.read_text())
    assert held[field] != value
    path.write_text(json.dumps(held, separators=(",", ":")))
    assert spend(restarted(tmp_path))  # so it is the field alone, and not how it is written
    shutil.rmtree(tmp_path / "spent")
    path.write_text(json.dumps(held | {field: value}, separators=(",", ":")))
    sought = {field: tuple(value) if isinstance(value, list) else value}
    if field in ("uses", "expires", "signature"):
        sought = {}
    assert spend(restarted(tmp_path), **sought) is None
    assert spend(restarted(tmp_path)) is None


def test_a_forged_approval_counts_for_nothing(tmp_path: Path, folder: Requests) -> None:
    made = asked(folder)
    (tmp_path / "approvals").mkdir()
    forged = Approval(
        made.id, "alice", "scientist", "value", ("heart", "labs"), DIGEST, 1, NOW + timedelta(days=1), SHOWN
    )  # fmt: skip
    path = tmp_path / "approvals" / f"{made.id}.json"
    for approval in (forged, forged.signed(OwnerKey.generate())):
        path.write_bytes(msgspec.json.encode(approval))
        assert spend(restarted(tmp_path)) is None
    path.write_bytes(msgspec.json.encode(forged.signed(KEY)))
    assert spend(restarted(tmp_path))  # so it was the signature alone


def test_an_approval_under_another_name_is_no_second_one(tmp_path: Path, folder: Requests) -> None:
    made = folder.approve(asked(folder).id, KEY)
    for other in ("0" * 16, "copy", f"{made.id}.2"):
        shutil.copy(tmp_path / "approvals" / f"{made.id}.json", tmp_path / "approvals" / f"{other}.json")
    assert spend(restarted(tmp_path))
    assert spend(restarted(tmp_path)) is None


def test_a_spent_approval_put_back_stays_spent(tmp_path: Path, folder: Requests) -> None:
    made = folder.approve(asked(folder).id, KEY)
    path = tmp_path / "approvals" / f"{made.id}.json"
    whole = path.read_bytes()
    assert spend(folder)
    path.unlink()
    assert spend(folder) is None
    path.write_bytes(whole)
    assert spend(folder) is None
    assert spend(restarted(tmp_path)) is None


@pytest.mark.parametrize("text", [b"", b"{", b'"0"', b"-1", b"1.5", b"null", b"[0]", b"true", b"\xff"])
def test_a_count_that_is_damaged_counts_as_used_up(tmp_path: Path, folder: Requests, text: bytes) -> None:
    made = folder.approve(asked(folder).id, KEY, uses=3)
    assert spend(folder)
    (tmp_path / "spent" / f"{made.id}.json").write_bytes(text)
    assert spend(folder) is None


def test_a_use_is_counted_before_it_is_given(tmp_path: Path, folder: Requests, monkeypatch: pytest.MonkeyPatch) -> None:
    made = folder.approve(asked(folder).id, KEY)

    def full(path: Path, data: bytes) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("housecall.owner.approvals.replace", full)
        with pytest.raises(OSError, match="no space"):
            spend(folder)
    assert not (tmp_path / "spent").exists() or not list((tmp_path / "spent").iterdir())
    assert spend(folder) == made


def test_a_crash_between_approval_and_request_can_be_mended(tmp_path: Path, folder: Requests) -> None:
    made = asked(folder)
    path = tmp_path / "requests" / f"{made.id}.json"
    waiting = path.read_bytes()
    folder.approve(made.id, KEY)
    path.write_bytes(waiting)
    assert folder.get(made.id).status == "pending"
    folder.approve(made.id, KEY)
    assert [spend(folder) is not None for _ in range(2)] == [True, False]  # one approval, however often it was written
    path.write_bytes(waiting)
    folder.deny(made.id, "no")
    assert spend(folder) is None


def test_a_damaged_request_spoils_no_other(tmp_path: Path, folder: Requests, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = asked(folder), asked(folder, principal="bob")
    (tmp_path / "requests" / f"{bad.id}.json").write_text('{"id": 1}')
    (tmp_path / "requests" / f"{'0' * 16}.json").write_bytes((tmp_path / "requests" / f"{good.id}.json").read_bytes())
    (tmp_path / "requests" / "notes.json").write_text("mine")
    assert folder.pending() == (good,)
    assert f"request {bad.id} cannot be read" in caplog.text
    with pytest.raises(PolicyError, match="cannot be read: it says that it is"):
        folder.get("0" * 16)
    asked(folder, principal="carol")


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))
def test_an_approval_opens_for_nobody_else(who: str, role: str, digest: str, data_set: str) -> None:
    kept = Requests(None, KEY.public, clock=lambda: NOW)
    kept.approve(asked(kept).id, KEY)
    if (who, role, digest, data_set) != ("alice", "scientist", DIGEST, "heart"):
        assert kept.spend(who, role, "value", digest, SHOWN, (data_set, "labs")) is None


def test_what_is_signed_tells_its_fields_apart() -> None:
    def message(who: str, role: str) -> bytes:
        return Approval("1", who, role, "value", ("a",), "d", 1, NOW, SHOWN).message()

    assert message("ab", "c") != message("a", "bc")
    assert message('a","', "b") != message("a", '","b')
    assert message("a", "b").startswith(b"housecall approval 1\0")


# -- the commands -----------------------------------------------------------------------------------------------

Run = Callable[..., str]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / CONFIG_FILE).write_text('name = "clinic"\n')
    OwnerKey.create(tmp_path)
    return tmp_path


def worker(place: Path) -> Requests:
    return Requests(place, OwnerKey.load(place).public)


@pytest.fixture
def run(place: Path) -> Run:
    app = Typer()
    for command in (cli.requests, cli.show, cli.approve, cli.deny):
        app.command()(command)

    def typed(*arguments: str, fails: bool = False, answer: str | None = None) -> str:
        result: Result = CliRunner(env={"COLUMNS": "200"}).invoke(
            app, [*arguments, "--folder", str(place)], input=answer
        )
        if isinstance(result.exception, HousecallError):
            raise result.exception
        assert (result.exit_code != 0) == fails, result.output
        return result.output

    return typed


def permit(place: Path, name: str) -> None:
    policy = Policy(
        use=Use(interactive=("alice",), plans=("alice",)), plans=Plans(ask=True), release=Release(approvals=True)
    )
    (place / "policies").mkdir(exist_ok=True)
    (place / "policies" / f"{name}.toml").write_text(policy.text())
    key = OwnerKey.load(place)
    sign(place, draft(place, name, key.public), key)


def test_an_owner_reads_and_approves(place: Path, run: Run) -> None:
    assert "No requests wait." in run("requests")
    made = asked(worker(place), reason="for the [red]paper[/red]\nand more")
    listed = run("requests")
    assert f"{made.id}" in listed
    assert "for the [red]paper[/red]" in listed  # as it was written, not as markup
    shown = run("show", made.id[:6])
    for line in (*PROGRAM.splitlines(), "scientist 'alice'", "heart + labs", "receives this one value exactly"):
        assert line in shown
    assert "an approval has no effect: heart: use" in shown
    permit(place, "heart")
    assert "no effect: labs: use" in run("show", made.id)
    permit(place, "labs")
    assert "no effect" not in run("show", made.id)
    assert "Nothing was approved" in run("approve", made.id, answer="n\n", fails=True)
    assert spend(worker(place)) is None
    output = run("approve", made.id, "--uses", "2", "--hours", "1", answer="y\n")
    assert "%1 = sum(x)" in output  # nobody approves what she was not shown
    assert "2 times until" in output
    held = spend(worker(place))
    assert held is not None
    assert held.uses == 2
    assert held.expires - datetime.now(UTC) <= timedelta(hours=1)
    assert "No requests wait." in run("requests")
    assert "approved" in run("requests", "--all")
    run("deny", made.id, "--reason", "enough")
    assert spend(worker(place)) is None


def test_an_owner_is_told_what_has_no_effect(place: Path, run: Run) -> None:
    made = asked(worker(place), kind="program")
    assert "may run this program on heart and labs" in run("show", made.id)
    assert "no effect: heart: use.plans" in run("approve", made.id, "--yes")


def test_an_owner_approves_a_program_and_that_its_outputs_leave(place: Path, run: Run) -> None:
    permit(place, "heart")
    made = asked(worker(place), kind="program", data_sets=("heart",), runs=32)
    assert "program aaaaaaaaaaaa, 32 times" in run("requests")
    assert "With --release you approve that too" in run("show", DIGEST)
    output = run("approve", made.id, "--uses", "32", "--release", answer="y\n")
    assert "32 times within 24 hours, AND LET OUT WHAT ITS RUNS MAKE?" in output
    assert "what its runs make may leave" in output
    held = spend(worker(place), kind="program", data_sets=("heart",))
    assert held is not None
    assert held.release
    assert worker(place).lets_out([held.id], "alice", "scientist", ["heart"])
    other = asked(worker(place), kind="program", data_sets=("heart",), digest="b" * 64)
    assert "any number of times" in run("approve", other.id, "--any-number", "--yes")
    value = asked(worker(place))
    with pytest.raises(UsageError, match="that is no program"):
        run("approve", value.id, "--release", "--yes")


def test_a_digest_that_several_ask_for_is_nobodys_request(place: Path, run: Run) -> None:
    permit(place, "heart")
    made = asked(worker(place), kind="program", data_sets=("heart",))
    asked(worker(place), kind="program", data_sets=("heart",), runs=2)
    assert "alice" in run("show", DIGEST)  # hers, the first
    other = asked(worker(place), kind="program", data_sets=("heart",), principal="bob")
    with pytest.raises(UsageError, match=f"{made.id} of scientist 'alice', .*{other.id} of scientist 'bob'"):
        run("approve", DIGEST, "--yes")
    run("approve", other.id, "--yes")
    assert spend(worker(place), kind="program", data_sets=("heart",), principal="bob")


@pytest.mark.parametrize(
    "changes",
    [{"principal": "bob"}, {"role": "worker"}, {"data_sets": ["heart", "lungs"]}, {"ids": ["0" * 16]}, {"ids": []}],
)
def test_what_a_program_makes_leaves_to_whom_it_was_approved(kept: Requests, changes: dict[str, Any]) -> None:
    made = kept.approve(asked(kept, kind="program").id, KEY, release=True)
    given: dict[str, Any] = {"ids": [made.id], "principal": "alice", "role": "scientist", "data_sets": ["heart"]}
    assert kept.lets_out(**given)
    assert not kept.lets_out(**(given | changes))
    silent = kept.approve(asked(kept, kind="program", digest="c" * 64).id, KEY)
    assert not kept.lets_out(**(given | {"ids": [made.id, silent.id]}))


def test_what_a_program_makes_stays_once_the_approval_is_over(kept: Requests, clock: Clock) -> None:
    made = kept.approve(asked(kept, kind="program").id, KEY, release=True)
    given: Any = ([made.id], "alice", "scientist", ["heart"])
    assert spend(kept, kind="program")
    assert kept.lets_out(*given)  # it is used up: no more runs, and what the last one made may leave
    clock.now += timedelta(hours=25)
    assert not kept.lets_out(*given)
    clock.now = NOW
    kept.deny(made.id, "a mistake")
    assert not kept.lets_out(*given)


def test_an_answer_is_told_once_in_each_process_also_if_that_cannot_be_kept(
    tmp_path: Path, folder: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = asked(folder)
    assert list(folder.news()) == []
    approval = folder.approve(made.id, KEY)
    ((request, found),) = folder.news()
    assert (request.status, found) == ("approved", approval)
    ((request, _),) = folder.news()  # until it is said that it was told
    with monkeypatch.context() as patched:
        patched.setattr(type(folder._shelf), "write", _full)
        folder.told(request)
    assert list(folder.news()) == []
    ((request, _),) = restarted(tmp_path).news()
    folder.told(request)
    assert list(restarted(tmp_path).news()) == []
    folder.deny(made.id, "a mistake")
    ((request, found),) = folder.news()
    assert (request.status, found) == ("denied", None)


def _full(*args: Any) -> None:
    raise OSError("no space left on device")


def test_an_approval_is_of_the_text_that_was_read(kept: Requests) -> None:
    kept.approve(asked(kept).id, KEY)
    assert spend(kept, shown=hashlib.sha256(b"another program").hexdigest()) is None
    assert spend(kept)


def test_an_owner_denies(place: Path, run: Run) -> None:
    made = asked(worker(place))
    run("deny", made.id, fails=True)  # a reason is due
    assert "of scientist 'alice' is denied" in run("deny", made.id, "--reason", "too much")
    assert worker(place).get(made.id).words == "too much"
    assert "denied: too much" in run("show", made.id)


def test_a_name_that_is_none_or_several(place: Path, run: Run) -> None:
    with pytest.raises(UsageError, match="no request begins with 'f'"):
        run("show", "f")
    numbers = iter(["a" + "0" * 15, "a" + "1" * 15])
    kept = Requests(place, OwnerKey.load(place).public, new_id=lambda: next(numbers))
    asked(kept)
    asked(kept, principal="bob")
    with pytest.raises(UsageError, match="2 requests begin with 'a'"):
        run("approve", "a")
    with pytest.raises(UsageError, match="no request begins with ''"):
        run("show", "")


def test_without_the_owners_key_nothing_is_approved(place: Path, run: Run) -> None:
    made = asked(worker(place))
    (place / "owner.key").unlink()
    with pytest.raises(PolicyError, match="only the owner's key can sign"):
        run("approve", made.id, "--yes")
    assert "wait" not in run("requests")
