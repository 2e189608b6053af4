"""The ledger: what was acknowledged is there, whatever happens, and whoever changes it is found."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from click.testing import Result
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from housecall.cli.ledger import ledger as command
from housecall.errors import LedgerError, UsageError
from housecall.host.config import Config
from housecall.identity.authority import Authority
from housecall.identity.certificate import utc_now
from housecall.owner.heads import Countersigned, Head, Signer, countersign, statement
from housecall.owner.journal import LAG, MAX_LINE, Line
from housecall.owner.ledger import Account, Entry, Ledger, Privacy, Sealed
from housecall.owner.policy import Budget
from housecall.owner.spending import Spending, recount
from housecall.privacy.accounting import Cost, exact

NOON = datetime(2030, 1, 2, 12, 0, 0, 5, tzinfo=UTC)
RELEASE = Entry(
    "release",
    "scientist 'alice'",
    ("heart", "labs"),
    "ab" * 32,
    ("clip", "noise"),
    Privacy(0.5, 1e-6, "person"),
    "release.update: yes",
    'a "detail"\n\x1b[31m é',
)


def refusal(number: int) -> Entry:
    return Entry("refusal", "scientist 'mallory'", ("heart",), decision=f"no {number}")


Make = Callable[..., Ledger]


class Contract:
    """What every ledger must do, wherever it lies."""

    def test_what_is_appended_is_there_in_its_place(self, make: Make) -> None:
        ledger = make(clock=lambda: NOON)
        first, second = ledger.append(RELEASE), ledger.append(refusal(2))
        assert list(ledger.entries()) == [first, second]
        assert (first.sequence, first.time, first.entry) == (1, NOON, RELEASE)
        assert (second.sequence, second.entry) == (2, refusal(2))
        found = ledger.verify()
        assert (found.entries, found.head, found.known, found.pending) == (2, second.head(ledger.public), 0, False)
        assert ledger.head() == found.head

    def test_the_chain_is_as_described(self, make: Make) -> None:
        ledger = make()
        lines = [msgspec.json.encode(ledger.append(refusal(number))) for number in range(3)]
        previous = hashlib.sha256(b"housecall ledger 1").hexdigest()
        for line in lines:
            assert json.loads(line)["previous"] == previous
            previous = hashlib.sha256(line).hexdigest()
        head, body = ledger.head(), json.loads(lines[-1])
        signature = body.pop("signature")
        digest = hashlib.sha256(json.dumps(body, separators=(",", ":")).encode()).hexdigest()
        assert (head.hash, head.signature) == (digest, signature)
        assert head.signed_by(ledger.public)

    def test_times_are_utc(self, make: Make) -> None:
        east = NOON.astimezone(datetime.now().astimezone().tzinfo) + timedelta(0)
        assert make(clock=lambda: east).append(RELEASE).time == NOON
        naive = make(clock=lambda: NOON.replace(tzinfo=None))
        with pytest.raises(LedgerError, match="time without a zone"):
            naive.append(RELEASE)

    def test_an_empty_ledger_is_whole_and_has_no_head(self, make: Make) -> None:
        ledger = make()
        assert list(ledger.entries()) == []
        assert ledger.verify().head is None
        with pytest.raises(LedgerError, match="no entries yet"):
            ledger.head()

    @pytest.mark.parametrize(
        "entry",
        [
            Entry("gift"),  # type: ignore[arg-type]  # wrong on purpose, as are those below
            Entry("run", principal=3),  # type: ignore[arg-type]
            Entry("run", data_sets="heart"),  # type: ignore[arg-type]
            Entry("run", privacy=Privacy(float("nan"), 0.0)),
            Entry("run", privacy=Privacy(float("inf"), 0.0)),
            Entry("run", privacy=Privacy(-1.0, 0.0)),
            Entry("run", privacy=Privacy(1.0, 1.5)),
            Entry("run", of=0),
            Entry("run", details="\ud800"),
            Entry("run", details="x" * MAX_LINE),
            Entry("run", details=object()),  # type: ignore[arg-type]
            {"kind": "run", "more": 1},
        ],
    )
    def test_what_is_no_entry_is_refused_and_changes_nothing(self, make: Make, entry: Any) -> None:
        ledger = make()
        ledger.append(RELEASE)
        with pytest.raises(LedgerError, match=r"cannot be an entry|shorten its texts"):
            ledger.append(entry)
        assert ledger.append(refusal(2)).sequence == 2
        assert ledger.verify().entries == 2

    def test_numbers_become_what_they_are_read_as(self, make: Make) -> None:
        ledger = make()
        sealed = ledger.append(Entry("run", data_sets=["a"], privacy=Privacy(1, 0)))  # type: ignore[arg-type]
        assert sealed.entry == Entry("run", data_sets=("a",), privacy=Privacy(1.0, 0.0))
        assert list(ledger.entries()) == [sealed]
        ledger.verify()

    def test_threads_append_one_after_the_other(self, make: Make) -> None:
        ledger = make()
        with ThreadPoolExecutor(8) as pool:
            sealed = list(pool.map(lambda number: ledger.append(refusal(number)), range(80)))
        assert sorted(one.sequence for one in sealed) == list(range(1, 81))
        assert list(ledger.entries()) == sorted(sealed, key=lambda one: one.sequence)
        assert ledger.verify().entries == 80

    def test_a_closed_ledger_takes_nothing(self, make: Make) -> None:
        with make() as ledger:
            ledger.append(RELEASE)
        ledger.close()
        with pytest.raises(LedgerError, match="it was closed"):
            ledger.append(RELEASE)
        assert ledger.verify().entries == 1

    def test_a_head_that_was_kept_fits_for_ever(self, make: Make) -> None:
        ledger = make()
        heads = []
        for number in range(4):
            ledger.append(refusal(number))
            heads.append(Head.parse(ledger.head().text()))
        assert ledger.verify(extends=heads).known == 4
        assert ledger.verify(extends=heads[1]).known == 1

    def test_a_head_of_another_history_does_not(self, make: Make) -> None:
        key = Signer.generate()
        ledger, other, longer, foreign = (make(key=key), Ledger(key=key), Ledger(key=key), Ledger())
        for one in (ledger, foreign, longer):
            one.append(refusal(1))
        other.append(refusal(2))
        longer.append(refusal(2))
        for head, message in (
            (other.head(), "history was rewritten"),
            (longer.head(), "ends with entry 1, but the head that was kept is of entry 2"),
            (foreign.head(), "not signed by this ledger's key"),
            (msgspec.structs.replace(ledger.head(), key=foreign.public.hex()), "not signed by this ledger's key"),
            (msgspec.structs.replace(ledger.head(), time=NOON), "not signed by this ledger's key"),
            (msgspec.structs.replace(ledger.head(), hash="0" * 64), "not signed by this ledger's key"),
        ):
            with pytest.raises(LedgerError, match=message):
                ledger.verify(extends=[ledger.head(), head])

    def test_others_countersign_what_they_saw(self, make: Make) -> None:
        key = Signer.generate()
        ledger = make(key=key)
        ledger.append(refusal(1))
        seen = auditor(ledger.head())
        ledger.append(refusal(2))
        ledger.keep(Countersigned.parse(seen.text()))
        assert ledger.kept() == (seen,)
        assert ledger.verify().known == 1
        assert Head.parse(seen.text()) == seen.head
        other = Ledger(key=key)
        other.append(refusal(3))
        with pytest.raises(LedgerError, match="history was rewritten"):
            ledger.keep(auditor(other.head()))
        with pytest.raises(LedgerError, match="countersignature of 'mallory'"):
            ledger.keep(msgspec.structs.replace(seen, by="mallory"))
        assert ledger.kept() == (seen,)


class TestMemory(Contract):
    @pytest.fixture
    def make(self) -> Make:
        return Ledger


class TestDisk(Contract):
    @pytest.fixture
    def make(self, tmp_path: Path) -> Iterator[Make]:
        made: list[Ledger] = []

        def make(**options: Any) -> Ledger:
            folder = tmp_path / str(len(made))
            folder.mkdir()
            made.append(Ledger(folder, file_bytes=1500, **options))
            return made[-1]

        yield make
        for ledger in made:
            ledger.close()


def auditor(head: Head) -> Countersigned:
    key = Ed25519PrivateKey.from_private_bytes(b"a" * 32)
    public = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return countersign(head, "auditor 'ann'", public, key.sign, lambda: NOON)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.builds(Entry, st.just("request"), st.text(), st.lists(st.text()).map(tuple), details=st.text())))
def test_any_text_comes_back(entries: list[Entry]) -> None:
    ledger = Ledger()
    kept = []
    for entry in entries:
        try:
            kept.append(ledger.append(entry).entry)
        except LedgerError:
            assert any("\ud800" <= char <= "\udfff" for char in str(entry))
    assert [sealed.entry for sealed in ledger.entries()] == kept
    ledger.verify()


# -- on the disk ------------------------------------------------------------------------------------------------------


def filled(folder: Path, count: int = 7, file_bytes: int = 1500) -> Head:
    """A ledger with entries in several files, closed; its head."""
    with Ledger(folder, file_bytes=file_bytes, clock=lambda: NOON) as ledger:
        for number in range(count):
            ledger.append(refusal(number))
        return ledger.head()


def entry_files(folder: Path) -> list[Path]:
    return sorted((folder / "ledger").glob("0*.jsonl"))


def test_files_are_rotated_and_the_chain_goes_on(tmp_path: Path) -> None:
    head = filled(tmp_path)
    names = [path.name for path in entry_files(tmp_path)]
    assert names == [f"{number:06}.jsonl" for number in range(1, len(names) + 1)]
    assert len(names) > 2
    assert all(path.stat().st_size <= 1500 for path in entry_files(tmp_path))
    account = Account(tmp_path)
    assert [sealed.sequence for sealed in account.entries()] == list(range(1, 8))
    assert account.head() == account.verify(extends=head).head == head


def test_a_ledger_is_for_this_user_only(tmp_path: Path) -> None:
    filled(tmp_path)
    inner = tmp_path / "ledger"
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [inner, tmp_path / "ledger.key", *inner.iterdir()]}
    assert modes.pop(inner) == 0o700
    assert set(modes.values()) == {0o600}
    assert len(modes) > 5
    for path in (entry_files(tmp_path)[-1], inner / "heads.jsonl", tmp_path / "ledger.key"):
        path.chmod(0o640)
        with pytest.raises(LedgerError, match="others may touch"):
            Ledger(tmp_path)
        path.chmod(0o600)
    Ledger(tmp_path).close()


def test_it_goes_on_where_it_ended(tmp_path: Path) -> None:
    head = filled(tmp_path)
    with Ledger(tmp_path) as ledger:
        assert ledger.head() == head
        assert ledger.append(RELEASE).sequence == 8
    assert Account(tmp_path).verify(extends=head).entries == 8


class Disk:
    """Notes what is written and synced, by file name, and fails where it is told to."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []
        self.fails: Callable[[str, str], OSError | None] = lambda act, name: None
        self.short = 0

    def write(self, handle: int, data: bytes) -> int:
        self._meet("write", handle)
        return os.write(handle, data[: self.short] if self.short else data)

    def sync(self, handle: int) -> None:
        self._meet("sync", handle)
        os.fsync(handle)

    def _meet(self, act: str, handle: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        self.done.append((act, name))
        error = self.fails(act, name)
        if error is not None:
            raise error

    def open(self, folder: Path, **options: Any) -> Ledger:
        return Ledger(folder, write=self.write, sync=self.sync, **options)


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks up names of open files in /proc")


@needs_proc
def test_an_entry_is_synced_before_append_returns(tmp_path: Path) -> None:
    disk = Disk()
    with disk.open(tmp_path, file_bytes=900) as ledger:
        assert ("sync", "ledger") in disk.done
        assert ("sync", tmp_path.name) in disk.done
        disk.done.clear()
        ledger.append(refusal(1))
        first = [("write", "000001.jsonl"), ("sync", "000001.jsonl"), ("write", "heads.jsonl")]
        assert disk.done == first
        ledger.append(refusal(2))
        disk.done.clear()
        ledger.append(refusal(3))
        assert disk.done == [("sync", "ledger"), *((act, name.replace("01.", "02.")) for act, name in first)]


@needs_proc
def test_writes_may_be_short(tmp_path: Path) -> None:
    disk = Disk()
    disk.short = 7
    with disk.open(tmp_path) as ledger:
        ledger.append(RELEASE)
    assert Account(tmp_path).verify().entries == 1


FAILURES = [
    ("write", "000001.jsonl", errno.ENOSPC),
    ("sync", "000001.jsonl", errno.EIO),
    ("write", "heads.jsonl", errno.EDQUOT),
    ("sync", "ledger", errno.EIO),
    ("write", "000002.jsonl", errno.ENOSPC),
]


@needs_proc
@pytest.mark.parametrize(("act", "name", "number"), FAILURES)
def test_what_cannot_be_written_is_not_acknowledged_and_nothing_after_it(
    tmp_path: Path, act: str, name: str, number: int
) -> None:
    disk = Disk()
    ledger = disk.open(tmp_path, file_bytes=900)
    acknowledged = [ledger.append(refusal(1))]
    disk.fails = lambda *found: OSError(number, os.strerror(number)) if found == (act, name) else None
    with pytest.raises(LedgerError, match=f"cannot be written: {os.strerror(number)}.*opened again"):
        acknowledged.extend(ledger.append(refusal(count)) for count in range(2, 9))
    disk.fails = lambda *found: None  # the disk has room again: too late
    with pytest.raises(LedgerError, match="takes no entries: an entry could not be written"):
        ledger.append(refusal(9))
    assert list(ledger.entries())[: len(acknowledged)] == acknowledged
    ledger.close()
    with Ledger(tmp_path, file_bytes=900) as again:
        assert list(again.entries())[: len(acknowledged)] == acknowledged
        again.append(refusal(10))
        assert not again.verify().pending
    Account(tmp_path).verify()


def test_an_interrupt_while_writing_stops_the_ledger(tmp_path: Path) -> None:
    def sync(handle: int) -> None:
        if interrupted:
            raise KeyboardInterrupt
        os.fsync(handle)

    interrupted = False
    ledger = Ledger(tmp_path, sync=sync)
    interrupted = True
    with pytest.raises(KeyboardInterrupt):
        ledger.append(RELEASE)
    with pytest.raises(LedgerError, match="interrupted while it was written"):
        ledger.append(RELEASE)
    ledger.close()


@needs_proc
def test_a_full_disk_lets_no_ledger_open(tmp_path: Path) -> None:
    filled(tmp_path)
    disk = Disk()
    disk.fails = lambda act, name: OSError(errno.ENOSPC, "No space left on device") if act == "write" else None
    with pytest.raises(LedgerError, match="No space left"):
        disk.open(tmp_path)
    Ledger(tmp_path).close()  # and the lock is free


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(LedgerError, match="Permission denied"):
            Ledger(tmp_path)
    finally:
        tmp_path.chmod(0o700)


@needs_proc
def test_the_last_line_is_written_again_on_opening(tmp_path: Path) -> None:
    filled(tmp_path)
    last = entry_files(tmp_path)[-1].name
    disk = Disk()
    with disk.open(tmp_path):
        assert disk.done[:2] == [("write", last), ("sync", last)]
    assert Account(tmp_path).verify().entries == 7


def test_one_process_writes_and_others_read(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.append(RELEASE)
        with pytest.raises(LedgerError, match="by another process"):
            Ledger(tmp_path)
        script = (
            "import sys\nfrom housecall import LedgerError\nfrom housecall.owner.ledger import Account, Ledger\n"
            "print(Account(sys.argv[1]).verify().entries)\ntry:\n    Ledger(sys.argv[1])\n"
            "except LedgerError as error:\n    print(error)\nassert 'torch' not in sys.modules"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert done.stdout.startswith("1\n"), done.stderr
        assert "being written, or verified, by another process" in done.stdout
        assert done.returncode == 0, done.stderr
    Ledger(tmp_path).close()


def test_a_forked_copy_may_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.append(RELEASE)
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(LedgerError, match="may only read"):
            ledger.append(RELEASE)
        assert ledger.verify().entries == 1


@needs_proc
def test_readers_see_a_whole_ledger_while_it_is_written(tmp_path: Path) -> None:
    disk = Disk()
    seen: list[tuple[int, bool]] = []

    def look(act: str, name: str) -> None:
        if name.endswith(".jsonl"):
            found = Account(tmp_path).verify()
            assert [sealed.sequence for sealed in Account(tmp_path).entries()] == list(range(1, found.entries + 1))
            seen.append((found.entries, found.pending))

    with disk.open(tmp_path, file_bytes=900) as ledger:
        disk.short, disk.fails = 100, look
        for number in range(5):
            ledger.append(refusal(number))
            assert seen[-1][0] >= number
    assert {pending for _, pending in seen} == {True, False}
    assert Account(tmp_path).verify() == ledger.verify()


def test_lost_heads_are_found_while_it_is_written(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        for number in range(5):
            ledger.append(refusal(number))
        cut_lines(tmp_path / "ledger" / "heads.jsonl", 2)
        for verify in (ledger.verify, Account(tmp_path).verify):
            with pytest.raises(LedgerError, match="heads of the last 2 entries are missing"):
                verify()


def test_a_writer_knows_what_it_acknowledged(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        for number in range(5):
            ledger.append(refusal(number))
        cut_lines(tmp_path / "ledger" / "heads.jsonl", 2)
        cut_lines(tmp_path / "ledger" / "000001.jsonl", 2)
        with pytest.raises(LedgerError, match="ends with entry 3, but the last head is of entry 5"):
            ledger.verify()


# -- what a crash leaves ----------------------------------------------------------------------------------------------


def cut_lines(path: Path, count: int) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-count]))


def lose_last(folder: Path, kept: int) -> None:
    """As if the process was killed while it wrote the last entry: `kept` bytes of it are there."""
    cut_lines(folder / "ledger" / "heads.jsonl", 1)
    path = entry_files(folder)[-1]
    line = path.read_bytes().splitlines(keepends=True)[-1]
    cut_lines(path, 1)
    with path.open("ab") as file:
        file.write(line[:kept])


@pytest.mark.parametrize("kept", [1, 10, 40, 200, -1])
def test_a_torn_line_was_never_acknowledged(tmp_path: Path, kept: int, caplog: pytest.LogCaptureFixture) -> None:
    filled(tmp_path)
    lose_last(tmp_path, kept)
    torn = entry_files(tmp_path)[-1].read_bytes().splitlines()[-1]
    with pytest.raises(LedgerError, match=r"0000\d\d.jsonl line \d has no end: a crash left it, or it was cut"):
        Account(tmp_path).verify()
    assert len(list(Account(tmp_path).entries())) == 6
    with Ledger(tmp_path) as ledger:
        assert "was not closed: cut" in caplog.text
        entry = list(ledger.entries())[-1].entry
        assert (ledger.head().sequence, entry.kind) == (7, "recovered")
        assert f"cut {len(torn)} bytes" in entry.details
        assert hashlib.sha256(torn).hexdigest() in entry.details
    assert Account(tmp_path).verify().entries == 7


def test_zeros_at_the_end_are_a_torn_line(tmp_path: Path) -> None:
    filled(tmp_path)
    with entry_files(tmp_path)[-1].open("ab") as file:
        file.write(bytes(300))
    with Ledger(tmp_path) as ledger:
        assert ledger.verify().entries == 8


def test_what_is_no_torn_line_is_damage(tmp_path: Path) -> None:
    filled(tmp_path)
    with entry_files(tmp_path)[-1].open("ab") as file:
        file.write(b'{"sequence":9,"time')
    with pytest.raises(LedgerError, match="does not begin as entry 8"):
        Ledger(tmp_path)


def test_an_acknowledged_line_that_was_cut_is_no_torn_one(tmp_path: Path) -> None:
    filled(tmp_path)
    path = entry_files(tmp_path)[-1]
    path.write_bytes(path.read_bytes()[:-9])
    for read in (Ledger, lambda folder: Account(folder).verify()):
        with pytest.raises(LedgerError, match=r"heads\.jsonl line 7 is of an entry after 6"):
            read(tmp_path)


@pytest.mark.parametrize("lost", [1, 3, LAG])
@pytest.mark.parametrize("torn", [0, 30])
def test_heads_that_a_crash_lost_are_written_again(tmp_path: Path, lost: int, torn: int) -> None:
    head = filled(tmp_path, LAG + 2)
    path = tmp_path / "ledger" / "heads.jsonl"
    before = path.read_bytes()
    cut_lines(path, lost)
    with path.open("ab") as file:
        file.write(before[path.stat().st_size :][:torn])
    with pytest.raises(LedgerError, match=f"heads of the last {lost} entries are missing"):
        Account(tmp_path).verify()
    with Ledger(tmp_path) as ledger:
        assert list(ledger.entries())[-1].entry.details == f"wrote {lost} heads that were missing"
    assert path.read_bytes().startswith(before)
    assert Account(tmp_path).verify(extends=head).entries == LAG + 3


def test_more_heads_than_a_crash_loses_were_cut_off(tmp_path: Path) -> None:
    filled(tmp_path, LAG + 2)
    cut_lines(tmp_path / "ledger" / "heads.jsonl", LAG + 1)
    with pytest.raises(LedgerError, match="somebody cut them off"):
        Ledger(tmp_path)


def crashes(root: Path, story: str) -> Path:
    """Folders with what is left of a story that was killed at every write and sync."""
    script = Path(__file__).with_name("ledger_crashes.py")
    done = subprocess.run([sys.executable, script, root, story], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = dict(line.split() for line in done.stdout.splitlines())
    assert set(counts) == {"before", "half", "after"}
    assert all(int(count) > 40 for count in counts.values())
    return root


def noted(folder: Path, name: str) -> list[list[str]]:
    path = folder / name
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_no_kill_loses_what_was_acknowledged(tmp_path: Path) -> None:
    kinds = set()
    for folder in sorted(crashes(tmp_path, "entries").iterdir()):
        acknowledged, begun = noted(folder, "acknowledged"), noted(folder, "begun")
        with Ledger(folder, file_bytes=1_200) as ledger:
            entries = {sealed.sequence: sealed.entry for sealed in ledger.entries()}
            ledger.append(RELEASE)
        for sequence, kind, what in acknowledged:
            assert (entries[int(sequence)].kind, entries[int(sequence)].decision) == (kind, what), folder
        # What was begun and not acknowledged may have been written or not; nothing else may be there.
        written = [[entry.kind, entry.decision] for entry in entries.values() if entry.kind != "recovered"]
        waiting = iter(begun)
        assert all(line in waiting for line in written), folder  # so they are in their order
        kinds |= {entry.kind for entry in entries.values()}
        assert Account(folder).verify().entries == len(entries) + 1
    assert kinds == {"run", "release", "recovered"}


def test_no_kill_gives_back_what_was_spent(tmp_path: Path) -> None:
    """The least that may be spent is what was paid for sure, the most what was begun."""
    answered = set()
    for folder in sorted(crashes(tmp_path, "payments").iterdir()):
        acknowledged, begun = noted(folder, "acknowledged"), noted(folder, "begun")
        with Ledger(folder, file_bytes=1_200) as ledger:
            spent = recount(ledger.entries()).get("the data", Cost())
            left = Spending(ledger).left("the data", Budget(epsilon=1_000, delta=1e-5))
            released = {sealed.entry.of for sealed in ledger.entries() if sealed.entry.kind == "release"}
        least = sum(exact(float(cost)) for _, what, cost in acknowledged if what == "paid")
        assert least <= sum(spent) <= sum(exact(float(cost)) for _, cost in begun), folder
        assert left == float(1_000 - spent.at(1e-5))
        assert {int(of) for of, what, _ in acknowledged if what == "answered"} <= released, folder
        answered |= released
    assert len(answered) >= 6


# -- whoever changes it is found --------------------------------------------------------------------------------------


@functools.cache
def whole() -> Path:
    """A closed ledger in three files, with a countersigned head. Nobody changes it: `changed` copies."""
    folder = Path(tempfile.mkdtemp(prefix="ledger-"))
    filled(folder, 8)
    account = Account(folder)
    account.keep(auditor(account.head()))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _swept() -> Iterator[None]:
    yield
    if whole.cache_info().currsize:
        shutil.rmtree(whole())
    whole.cache_clear()


def found(name: str, change: Callable[[bytes], bytes]) -> None:
    """That a change of one file is found, by a reader and by the next writer, who name the file or the entry."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "clinic"
        shutil.copytree(whole(), folder)
        path = folder / "ledger" / name
        before = path.read_bytes()
        after = change(before)
        assert after != before
        path.write_bytes(after)
        with pytest.raises(LedgerError, match=r"line \d|ledger\.pub|entries are missing|key"):
            Account(folder).verify()
        cut = name == "heads.jsonl" and before.startswith(after)  # a crash could have done so: repaired, and recorded
        if not cut:
            with pytest.raises(LedgerError):
                Ledger(folder)


LINES = ["000001.jsonl", "000002.jsonl", "000003.jsonl", "heads.jsonl"]
names = st.sampled_from(LINES)
places = st.integers(0, 10_000)
thorough = settings(deadline=None, max_examples=100)


@thorough
@given(st.sampled_from([*LINES, "countersigned.jsonl", "ledger.pub"]), places, st.integers(1, 255))
def test_any_byte_that_is_changed_is_found(name: str, place: int, bits: int) -> None:
    def change(data: bytes) -> bytes:
        at = place % len(data)
        return data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :]

    found(name, change)


def by_lines(data: bytes, change: Callable[[list[bytes]], None]) -> bytes:
    lines = data.splitlines(keepends=True)
    change(lines)
    return b"".join(lines)


@pytest.mark.parametrize("name", ["countersigned.jsonl", "ledger.pub"])
def test_every_byte_of_the_smaller_files_counts(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "clinic"
    shutil.copytree(whole(), folder)
    path = folder / "ledger" / name
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(LedgerError):
            Account(folder).verify()


@thorough
@given(names, places)
def test_any_line_that_is_deleted_is_found(name: str, place: int) -> None:
    found(name, lambda data: by_lines(data, lambda lines: lines.pop(place % len(lines)) and None))


@thorough
@given(names, places, places)
def test_any_line_that_is_there_twice_is_found(name: str, place: int, to: int) -> None:
    def double(lines: list[bytes]) -> None:
        lines.insert(to % (len(lines) + 1), lines[place % len(lines)])

    found(name, lambda data: by_lines(data, double))


@thorough
@given(names, places, st.integers(1, 10_000))
def test_any_two_lines_that_are_swapped_are_found(name: str, place: int, further: int) -> None:
    def swap(lines: list[bytes]) -> None:
        one = place % len(lines)
        other = (one + 1 + further % (len(lines) - 1)) % len(lines)
        lines[one], lines[other] = lines[other], lines[one]

    found(name, lambda data: by_lines(data, swap))


@thorough
@given(names, places)
def test_any_cut_is_found(name: str, place: int) -> None:
    found(name, lambda data: data[: place % len(data)])


@thorough
@given(names, places, st.binary(min_size=1, max_size=40))
def test_anything_put_in_is_found(name: str, place: int, extra: bytes) -> None:
    found(name, lambda data: data[: place % len(data)] + extra + data[place % len(data) :])


@pytest.mark.parametrize("name", [*LINES, "ledger.pub"])
def test_a_file_that_is_deleted_is_found(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "clinic"
    shutil.copytree(whole(), folder)
    (folder / "ledger" / name).unlink()
    with pytest.raises(LedgerError):
        Account(folder).verify()
    with pytest.raises(LedgerError):
        Ledger(folder)
    assert not (folder / "ledger" / name).exists()


def test_an_error_names_the_file_that_is_missing_or_cut(tmp_path: Path) -> None:
    folder = tmp_path / "clinic"
    shutil.copytree(whole(), folder)
    one, two, three = entry_files(folder)
    one.write_bytes(one.read_bytes()[:-1])
    with pytest.raises(LedgerError, match=r"000001\.jsonl line 3 has no end, and 000003\.jsonl follows"):
        Account(folder).verify()
    two.unlink()
    with pytest.raises(LedgerError, match=r"000002\.jsonl is missing, though 000003\.jsonl is there"):
        Account(folder).verify()
    one.unlink()
    three.unlink()
    with pytest.raises(LedgerError, match="a ledger was begun here, and its entries deleted"):
        Ledger(folder)


def test_a_line_that_is_changed_together_with_its_head_is_found(tmp_path: Path) -> None:
    filled(tmp_path, 4, file_bytes=10_000)
    public, path, heads = Account(tmp_path).public, entry_files(tmp_path)[0], tmp_path / "ledger" / "heads.jsonl"
    lines, known = (one.read_bytes().splitlines(keepends=True) for one in (path, heads))
    lines[1] = lines[1].replace(b"no 1", b"no 7")
    known[1] = msgspec.json.encode(msgspec.json.decode(lines[1], type=Sealed).head(public)) + b"\n"
    path.write_bytes(b"".join(lines))
    heads.write_bytes(b"".join(known))
    with pytest.raises(LedgerError, match=r"000001\.jsonl line 2 was changed: its signature is not of what it says"):
        Account(tmp_path).verify()


@pytest.mark.parametrize("end", [b' "}', b'"} ', b'","signature":"' + b"0" * 128 + b'"}', b'","more":1}'])
def test_the_last_line_has_one_form_only(tmp_path: Path, end: bytes) -> None:
    filled(tmp_path, 2, file_bytes=10_000)
    path = entry_files(tmp_path)[0]
    path.write_bytes(path.read_bytes().removesuffix(b'"}\n') + end + b"\n")
    with pytest.raises(LedgerError, match=r"is no entry|is not written as entries are|is not the head of"):
        Account(tmp_path).verify()


def test_files_that_change_places_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "clinic"
    shutil.copytree(whole(), folder)
    one, two, _ = entry_files(folder)
    one.rename(folder / "spare")
    two.rename(one)
    (folder / "spare").rename(two)
    with pytest.raises(LedgerError, match=r"000001\.jsonl line 1 has entry 4, expected entry 1: it is missing"):
        Account(folder).verify()


def test_a_file_through_a_link_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, 2)
    path = entry_files(tmp_path)[0]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    for read in (Ledger, lambda folder: Account(folder).verify()):
        with pytest.raises(LedgerError, match="symbolic links"):
            read(tmp_path)


def rewrite(folder: Path, key: Signer, change: Callable[[list[Sealed]], None]) -> None:
    """Write all of a ledger in one file anew, chained and with heads, as whoever has `key` could."""
    entries = list(Account(folder).entries())
    change(entries)
    lines, heads, previous = [], [], hashlib.sha256(b"housecall ledger 1").hexdigest()
    for number, sealed in enumerate(entries, 1):
        sealed = msgspec.structs.replace(sealed, sequence=number, previous=previous)
        made = key.sign(statement(number, sealed.hash, sealed.time)).hex()
        lines.append(msgspec.json.encode(msgspec.structs.replace(sealed, signature=made)))
        heads.append(msgspec.json.encode(Head(number, sealed.hash, sealed.time, Account(folder).public.hex(), made)))
        previous = hashlib.sha256(lines[-1]).hexdigest()
    (folder / "ledger" / "000001.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    (folder / "ledger" / "heads.jsonl").write_bytes(b"".join(head + b"\n" for head in heads))


def test_a_history_by_another_key_is_found(tmp_path: Path) -> None:
    filled(tmp_path, 4, file_bytes=10_000)
    rewrite(tmp_path, Signer.generate(), lambda entries: entries.pop(1) and None)
    for read in (Ledger, lambda folder: Account(folder).verify()):
        with pytest.raises(LedgerError, match=r"000001.jsonl line 1 is not signed by this ledger's key"):
            read(tmp_path)


def test_what_somebody_put_at_the_end_is_found(tmp_path: Path) -> None:
    filled(tmp_path, 3, file_bytes=10_000)
    heads = tmp_path / "ledger" / "heads.jsonl"
    entry = entry_files(tmp_path)[0]
    before, known = entry.read_bytes(), heads.read_bytes()
    rewrite(tmp_path, Signer.generate(), lambda entries: entries.append(entries[-1]))
    forged = msgspec.json.decode(entry.read_bytes().splitlines()[-1], type=Sealed)
    forged = msgspec.structs.replace(forged, previous=hashlib.sha256(before.splitlines()[-1]).hexdigest())
    entry.write_bytes(before + msgspec.json.encode(forged) + b"\n")
    heads.write_bytes(known)  # a crash would explain that the last head is missing
    with pytest.raises(LedgerError, match="line 4 is not signed by this ledger's key"):
        Ledger(tmp_path)


def test_its_own_owner_is_held_to_a_head_that_others_kept(tmp_path: Path) -> None:
    kept = filled(tmp_path, 4, file_bytes=10_000)
    rewrite(tmp_path, Signer.load(tmp_path / "ledger.key"), lambda entries: entries.pop(1) and None)
    assert Account(tmp_path).verify().entries == 3
    with pytest.raises(LedgerError, match="ends with entry 3"):
        Account(tmp_path).verify(extends=kept)
    rewrite(tmp_path, Signer.load(tmp_path / "ledger.key"), lambda entries: entries.append(entries[0]))
    assert Account(tmp_path).verify().entries == 4
    with pytest.raises(LedgerError, match="entry 4 is not the one of which the head that was kept is"):
        Account(tmp_path).verify(extends=kept)


def test_an_older_state_is_found_by_a_countersigned_head(tmp_path: Path) -> None:
    filled(tmp_path, 4, file_bytes=10_000)
    account = Account(tmp_path)
    account.keep(auditor(account.head()))
    cut_lines(tmp_path / "ledger" / "000001.jsonl", 1)
    cut_lines(tmp_path / "ledger" / "heads.jsonl", 1)
    for read in (Ledger, lambda folder: Account(folder).verify()):
        with pytest.raises(LedgerError, match=r"countersigned\.jsonl line 1, a countersigned head, is of entry 4"):
            read(tmp_path)


def test_lines_beyond_reason_are_not_read(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    entry_files(tmp_path)[0].write_bytes(b"[" * (MAX_LINE + 1))
    with pytest.raises(LedgerError, match="has more than 65,536 bytes"):
        Account(tmp_path).verify()
    entry_files(tmp_path)[0].write_bytes(b"[" * 60_000 + b"\n")
    with pytest.raises(LedgerError, match="is no entry"):
        list(Account(tmp_path).entries())


def test_the_same_in_memory() -> None:
    ledger = Ledger()
    for number in range(3):
        ledger.append(refusal(number))
    lines = ledger._pen._lines  # type: ignore[attr-defined]
    lines[1] = lines[1].replace(b"no 1", b"no 7")
    with pytest.raises(LedgerError, match="head 2 is not the head of entry 2"):
        ledger.verify()
    assert isinstance(next(ledger._journal.lines()), Line)


# -- keys -------------------------------------------------------------------------------------------------------------


def test_a_lost_or_exchanged_key_ends_the_ledger(tmp_path: Path) -> None:
    filled(tmp_path)
    key = tmp_path / "ledger.key"
    key.rename(tmp_path / "spare")
    with pytest.raises(LedgerError, match=r"ledger\.key is missing"):
        Ledger(tmp_path)
    assert not key.exists()
    Signer.create(key)
    with pytest.raises(LedgerError, match="one of them was exchanged"):
        Ledger(tmp_path)
    key.write_text("nonsense")
    with pytest.raises(LedgerError, match="no key that can be used"):
        Ledger(tmp_path)
    with pytest.raises(LedgerError, match="cannot be made"):
        Signer.create(key)
    (tmp_path / "spare").replace(key)
    with Ledger(tmp_path) as ledger:
        assert Account(tmp_path, ledger.public).verify().entries == 7
    assert "PRIVATE" not in repr(Signer.load(key))
    with pytest.raises(LedgerError, match="expected 0000"):
        Account(tmp_path, bytes(32))


def test_there_is_no_ledger_before_a_worker_ran(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no ledger in"):
        Account(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind":"head"}', "[" * 10_000, "\ud800", "é"])
def test_what_is_no_head_is_refused(text: str) -> None:
    with pytest.raises(LedgerError, match="the head is none"):
        Head.parse(text)


def test_what_is_too_long_for_a_head_is_not_read() -> None:
    ledger = Ledger()
    ledger.append(RELEASE)
    long = ledger.head().text() + " " * 20_000
    with pytest.raises(LedgerError, match="expected 16,384 at most"):
        Head.parse(long)


def test_nobody_signs_a_forged_head() -> None:
    ledger = Ledger()
    ledger.append(RELEASE)
    with pytest.raises(LedgerError, match="do not sign it"):
        auditor(msgspec.structs.replace(ledger.head(), sequence=2))
    foreign = Ed25519PrivateKey.generate()
    with pytest.raises(LedgerError, match="is not of this head and key"):
        countersign(ledger.head(), "eve", b"no key", foreign.sign, lambda: NOON)


# -- the command ------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> str:
    app = typer.Typer()
    app.command()(command)
    result: Result = CliRunner(env={"COLUMNS": "220"}).invoke(app, [str(one) for one in arguments])
    if isinstance(result.exception, Exception):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def clinic(tmp_path: Path) -> Path:
    """A worker's folder with a ledger, whose worker runs."""
    Config.create(tmp_path / "clinic", "clinic")
    ledger = Ledger(tmp_path / "clinic", clock=lambda: NOON)
    ledger.append(RELEASE)
    ledger.append(Entry("cancel", of=1, details="\u202e[red]"))
    ledger.close()
    return tmp_path / "clinic"


def test_the_command_shows_what_left(clinic: Path) -> None:
    shown = run("--folder", clinic)
    for text in ("2030-01-02 12:00:00", "release", "scientist 'alice'", "heart + labs", "abababababab", "clip > noise"):
        assert text in shown
    assert "ε 0.5, δ 1e-06 per person" in shown
    assert r"\u202e[red]" in shown  # neither a terminal nor rich obeys it
    assert "cancel 1" in shown
    assert "alice" not in run("--folder", clinic, "--last", 1)


def test_the_command_speaks_json(clinic: Path) -> None:
    lines = run("--folder", clinic, "--json").splitlines()
    assert [json.loads(line)["entry"]["kind"] for line in lines] == ["release", "cancel"]
    assert lines == (clinic / "ledger" / "000001.jsonl").read_text().splitlines()
    assert run("--folder", clinic, "--json", "--last", 1).splitlines() == lines[1:]
    assert json.loads(run("--folder", clinic, "--json", "--verify"))["entries"] == 2


def test_the_command_verifies(clinic: Path, tmp_path: Path) -> None:
    kept = tmp_path / "head.json"
    kept.write_text(run("--folder", clinic, "--head"))
    key = json.loads(kept.read_text())["key"]
    assert "is whole: 2 entries, the last of 2030-01-02 12:00:00." in run("--folder", clinic, "--verify")
    assert "goes on from 1 heads" in run("--folder", clinic, "--extends", kept, "--key", key)
    with pytest.raises(LedgerError, match="expected 00"):
        run("--folder", clinic, "--verify", "--key", "00" * 32)
    with pytest.raises(UsageError, match="expected hexadecimal"):
        run("--folder", clinic, "--verify", "--key", "xy")
    with pytest.raises(UsageError, match="one at a time"):
        run("--folder", clinic, "--verify", "--head")
    path = clinic / "ledger" / "000001.jsonl"
    path.write_text(path.read_text().replace("alice", "malic"))
    with pytest.raises(LedgerError, match=r"heads\.jsonl line 1 is not the head of ledger/000001\.jsonl line 1"):
        run("--folder", clinic, "--verify")
    with pytest.raises(LedgerError, match="line 1"):
        run("--folder", clinic)


def test_a_scientist_countersigns_and_the_owner_keeps_it(clinic: Path, tmp_path: Path) -> None:
    identity = Authority.create(tmp_path / "ca", "clinics").identity("alice", "scientist").save(tmp_path / "alice.pem")
    head, seen = tmp_path / "head.json", tmp_path / "seen.json"
    head.write_text(run("--folder", clinic, "--head"))
    with pytest.raises(UsageError, match="whose signature"):
        run("--countersign", head)
    seen.write_text(run("--countersign", head, "--identity", identity))
    made = Countersigned.parse(seen.read_text())
    assert made.by == "scientist 'alice'"
    assert made.time <= utc_now()
    assert "kept" in run("--folder", clinic, "--keep", seen)
    assert "goes on from 1 heads" in run("--folder", clinic, "--verify")
    assert "goes on from 2 heads" in run("--folder", clinic, "--extends", seen)
    with pytest.raises(LedgerError, match=r"head\.json is none"):
        run("--folder", clinic, "--keep", head)
    with pytest.raises(LedgerError, match="cannot be read"):
        run("--folder", clinic, "--keep", tmp_path / "nothing")


def rates(folder: Path, appends: int = 1_000, verified: int = 20_000) -> tuple[float, float]:
    """Appends per second, each synced to the disk, and entries verified per second, in a ledger in an empty folder."""
    with Ledger(folder) as ledger:
        begin = time.perf_counter()
        for _ in range(appends):
            ledger.append(RELEASE)
        appended = appends / (time.perf_counter() - begin)
    with Ledger(folder, sync=lambda _: None) as ledger:
        for _ in range(verified - appends):
            ledger.append(RELEASE)
    account = Account(folder)
    begin = time.perf_counter()
    entries = account.verify().entries
    return appended, entries / (time.perf_counter() - begin)


def test_rates_are_measured(tmp_path: Path) -> None:
    assert all(rate > 0 for rate in rates(tmp_path, 5, 10))
