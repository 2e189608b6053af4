"""A worker that dies is started anew: by a parent that passes signals on, and gives up on what always dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import housecall as hc
from housecall.cli.status import read_status
from housecall.host.config import Config
from housecall.host.lock import hold, let_go
from housecall.owner.signing import OwnerKey

PATIENCE = 60.0

# A parent whose child writes down how often it was started and how the one before died, then does what it is told.
PARENT = """
import logging, os, sys
from housecall.supervise import supervise
logging.basicConfig(format="%(message)s")
child = '''
import os, signal, sys, time
with open(sys.argv[1], "a") as file:
    file.write(sys.argv[2] + " " + sys.argv[3] + chr(10))
{child}
'''
def command(restarts, died):
    return [sys.executable, "-c", child, sys.argv[1], str(restarts), died]
sys.exit(supervise(command, os.environ, first_delay=0.01, **{options}))
"""


class Parent:
    def __init__(self, tmp_path: Path, child: str, **options: Any) -> None:
        self.notes = tmp_path / "notes"
        code = PARENT.replace("{child}", child).replace("{options}", repr(options))
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(self.notes)], stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def ends(self) -> tuple[int, str]:
        said = self.process.communicate(timeout=PATIENCE)[1]
        return self.process.returncode, said

    def starts(self, count: int) -> list[str]:
        end = time.monotonic() + PATIENCE
        while not self.notes.exists() or self.notes.read_text().count("\n") < count:
            assert time.monotonic() < end
            time.sleep(0.01)
        return self.notes.read_text().splitlines()


def test_who_dies_is_started_anew_and_told_of_it(tmp_path: Path) -> None:
    how = 'how = signal.SIGKILL if sys.argv[2] == "0" else signal.SIGSEGV'
    child = f"{how}\nif int(sys.argv[2]) < 2:\n    os.kill(os.getpid(), how)"
    parent = Parent(tmp_path, child)
    status, said = parent.ends()
    assert status == 0
    assert parent.starts(3) == ["0 ", "1 was killed by SIGKILL, perhaps for its memory", "2 was killed by SIGSEGV"]
    assert "was killed by SIGKILL, perhaps for its memory after 0 s; it is started anew in 0.01 s" in said
    assert "SIGSEGV after 0 s; it is started anew in 0.02 s" in said


def test_who_always_dies_is_given_up(tmp_path: Path) -> None:
    parent = Parent(tmp_path, "sys.exit(7)", most=3)
    status, said = parent.ends()
    assert status == 1
    assert len(parent.starts(3)) == 3
    assert "ended with status 7; that was 3 times, each within 60 s of its start: it is not started again" in said


def test_who_lives_for_a_while_is_not_given_up(tmp_path: Path) -> None:
    parent = Parent(tmp_path, "sys.exit(0 if int(sys.argv[2]) == 6 else 1)", most=3, quick_s=0.0)
    assert parent.ends()[0] == 0
    assert len(parent.starts(7)) == 7


def test_what_the_owner_has_to_mend_is_said_once(tmp_path: Path) -> None:
    parent = Parent(tmp_path, "sys.exit(2)")
    assert parent.ends()[0] == 2
    assert len(parent.starts(1)) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_passed_on_and_end_it(tmp_path: Path, number: signal.Signals) -> None:
    ready = 'open(sys.argv[1], "a").write("up" + chr(10))'
    parent = Parent(tmp_path, f"signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n{ready}\ntime.sleep(60)")
    parent.starts(2)
    parent.process.send_signal(number)
    assert parent.ends()[0] == 0
    assert len(parent.starts(2)) == 2


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_who_is_told_twice_says_so_by_another_signal(tmp_path: Path, second: signal.Signals) -> None:
    """But for a terminal that is closed, which may say so twice."""
    child = """
def told(number, frame):
    with open(sys.argv[1], "a") as file:
        file.write(signal.Signals(number).name + chr(10))
    if sys.argv.append(number) or len(sys.argv) == 6:
        sys.exit(0)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, told)
with open(sys.argv[1], "a") as file:
    file.write("up" + chr(10))
while True:
    time.sleep(60)
"""
    parent = Parent(tmp_path, child)
    parent.starts(2)
    parent.process.send_signal(second)
    parent.starts(3)
    parent.process.send_signal(second)
    assert parent.ends()[0] == 0
    again = "SIGTERM" if second is signal.SIGHUP else "SIGINT"
    assert parent.starts(4)[1:] == ["up", "SIGTERM", again]


# -- `housecall worker up` --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Config.create(tmp_path / "clinic", "clinic", "127.0.0.1:0")
    OwnerKey.create(tmp_path / "clinic")
    return tmp_path / "clinic"


def up(folder: Path, *options: str) -> subprocess.Popen[str]:
    code = "from housecall.cli.main import main; main()"
    command = [sys.executable, "-c", code, "worker", "up", "--folder", str(folder), "--plaintext", *options]
    with (folder.parent / "up.log").open("a") as log:
        return subprocess.Popen(command, stderr=log, text=True, start_new_session=True)


@pytest.fixture
def running(folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = up(folder)
    yield process
    process.terminate()
    process.wait(PATIENCE)


def said(folder: Path, restarts: int) -> dict[str, Any]:
    end = time.monotonic() + PATIENCE
    while (found := read_status(folder)) is None or found["restarts"] != restarts:
        assert time.monotonic() < end, (folder.parent / "up.log").read_text()
        time.sleep(0.05)
    return found


def test_a_killed_worker_is_up_again_and_says_so(folder: Path, running: subprocess.Popen[str]) -> None:
    first = said(folder, 0)
    assert first["pid"] != running.pid
    os.kill(first["pid"], signal.SIGKILL)
    second = said(folder, 1)
    assert second["died"] == "was killed by SIGKILL, perhaps for its memory"
    with hc.connect(f"grpc://{second['address']}") as clinic:
        assert torch.ones(2).send(clinic).add_(1).get().tolist() == [2.0, 2.0]
    running.terminate()
    assert running.wait(PATIENCE) == 0
    assert read_status(folder) is None
    let_go(hold(folder))  # nobody is left who has it


def test_who_kills_the_parent_ends_the_worker(folder: Path, running: subprocess.Popen[str]) -> None:
    said(folder, 0)
    running.kill()
    end = time.monotonic() + PATIENCE
    while read_status(folder) is not None:
        assert time.monotonic() < end
        time.sleep(0.05)


def log_of(folder: Path) -> str:
    return (folder.parent / "up.log").read_text()


def until_it_says(folder: Path, text: str) -> None:
    end = time.monotonic() + PATIENCE
    while text not in log_of(folder):
        assert time.monotonic() < end, log_of(folder)
        time.sleep(0.01)


def busy(folder: Path, address: str, calls: int, size: int) -> Any:
    """The client of a worker that has so many large products to make, and has begun to."""
    clinic = hc.connect(f"grpc://{address}")
    x: Any = hc.send(torch.ones(size, size), clinic)
    for _ in range(calls):
        torch.mm(x, x)
    clinic.session.flush()
    end = time.monotonic() + PATIENCE
    while not (read_status(folder) or {"busy_s": 0})["busy_s"]:
        assert time.monotonic() < end
        time.sleep(0.01)
    return clinic


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("options", [(), ("--once",)], ids=["with a parent", "once"])
def test_who_says_it_twice_does_not_wait(folder: Path, options: tuple[str, ...], number: signal.Signals) -> None:
    """The drain would take minutes, and may take an hour."""
    (folder / "worker.toml").write_text('name = "clinic"\nlisten = "127.0.0.1:0"\ndrain_s = 3600\n')
    process = up(folder, *options)
    try:
        clinic = busy(folder, said(folder, 0)["address"], calls=60, size=4000)
        process.send_signal(number)
        until_it_says(folder, "draining: what has come is done and answered, for up to 3600 s; told once more")
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(PATIENCE) == 1
    finally:
        process.kill()
        process.wait()
    clinic.close()
    log = log_of(folder)
    assert log.count("told once more to end: the process ends now; of what had come,") == 1
    assert "Traceback" not in log
    assert read_status(folder) is None
    let_go(hold(folder))


def test_a_process_with_a_parent_may_be_told_of_one_end_by_two(folder: Path) -> None:
    """As systemd does it: every process of a unit is told, and the parent passes on what it is told."""
    process = up(folder)
    clinic = busy(folder, said(folder, 0)["address"], calls=20, size=1000)
    os.kill(said(folder, 0)["pid"], signal.SIGTERM)
    until_it_says(folder, "draining")
    process.terminate()
    assert process.wait(PATIENCE) == 0
    assert "the process ends now" not in log_of(folder)
    assert "cut" not in log_of(folder)  # what had come was done
    clinic.close()


@pytest.mark.parametrize(
    ("setting", "options", "says"),
    [
        ('threads = "many"', (), "threads"),
        ("", ("--listen", "here"), "--listen 'here' must be HOST:PORT"),
        ("", ("--listen", "192.0.2.1:7443"), "cannot listen on 192.0.2.1:7443: Failed to bind"),
    ],
)
def test_trouble_of_its_owners_is_a_message_and_not_tried_again(
    folder: Path, setting: str, options: tuple[str, ...], says: str
) -> None:
    (folder / "worker.toml").write_text(f'name = "clinic"\nlisten = "127.0.0.1:0"\n{setting}\n')
    process = up(folder, *options)
    assert process.wait(PATIENCE) == 2
    log = (folder.parent / "up.log").read_text()
    assert says in log
    assert "Traceback" not in log
    assert log.count("housecall:") == 1


def test_status_of_a_number_that_is_anothers_by_now(folder: Path) -> None:
    """The process of this number lives, and is no worker."""
    (folder / "status.json").write_text(json.dumps({"pid": os.getpid(), "worker": "clinic"}))
    assert read_status(folder) is None
