"""Processes that keep a ledger and kill themselves (SIGKILL) at a chosen write or fsync.

For every such point, `python ledger_crashes.py FOLDER STORY` forks a child that plays a story in a folder of its own:
"entries", or "payments". What the ledger acknowledged the child notes in `acknowledged` beside it, what it was about
to ask for in `begun`: with plain writes, which outlive a kill.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from housecall.owner.ledger import Entry, Kind, Ledger
from housecall.owner.policy import Budget, Policy, Release, Use
from housecall.privacy.clip import Clip
from housecall.privacy.noise import Noise
from housecall.worker.gate import Gate, Registered, Who

MODES = ("before", "half", "after")
FILE_BYTES = 1_200  # two entries or three: files change within the story
DATA = Registered("heart", 100, "record", lambda: "the data")
WHO = Who("me", "scientist")


class Killer:
    """Counts writes and syncs; at number `at` it ends the process before it, halfway, or after it."""

    def __init__(self, at: int, mode: str) -> None:
        self.count, self.at, self.mode = 0, at, mode

    def write(self, handle: int, data: bytes) -> int:
        self._meet("before")
        if self._now("half"):
            os.write(handle, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        written = os.write(handle, data)
        self._meet("after")
        return written

    def sync(self, handle: int) -> None:
        self._meet("before")
        self._meet("half")  # there is no half of it
        os.fsync(handle)
        self._meet("after")

    def _meet(self, mode: str) -> None:
        self.count += mode == "before"
        if self._now(mode):
            os.kill(os.getpid(), signal.SIGKILL)

    def _now(self, mode: str) -> bool:
        return self.count == self.at and self.mode == mode


def note(folder: Path, name: str, text: str) -> None:
    with (folder / name).open("a") as file:
        file.write(text + "\n")


def story(folder: Path, killer: Killer) -> None:
    """Runs, and what they let out."""
    ledger = Ledger(folder, file_bytes=FILE_BYTES, write=killer.write, sync=killer.sync)
    for number in range(12):
        kind: Kind = "release" if number % 2 else "run"
        note(folder, "begun", f"{kind} {number}")
        sealed = ledger.append(Entry(kind, data_sets=("heart",), decision=str(number)))
        note(folder, "acknowledged", f"{sealed.sequence} {kind} {number}")
    ledger.close()


def policy(noise: Noise) -> Policy:
    return Policy(
        use=Use(interactive=("me",), statistics=("me",)),
        release=Release(statistics=True, update=(Clip(norm=1), noise)),
        budget=Budget(epsilon=1_000, delta=1e-5),
    )


def payments(folder: Path, killer: Killer) -> None:
    """Statistics that cost 1, 4, 16 of epsilon, between them updates that cost some 2, 8, 32 of rho: each is paid, then
    answered."""
    ledger = Ledger(folder, file_bytes=FILE_BYTES, write=killer.write, sync=killer.sync)
    for number in range(6):
        noise = Noise(multiplier=math.sqrt(2 / 2**number))
        gate = Gate({"heart": policy(noise)}, ledger=ledger)
        cost = noise.rho if number % 2 else 2.0**number
        note(folder, "begun", f"paid {cost}")
        if number % 2:
            _, (paid,) = gate.update(WHO, [DATA], "an update")
        else:
            paid = gate.statistics(WHO, DATA, cost, "a mean")
        note(folder, "acknowledged", f"{paid.sequence} paid {cost}")
        gate.answered(WHO, paid, "it")
        note(folder, "acknowledged", f"{paid.sequence} answered {cost}")
    ledger.close()


STORIES = {"entries": story, "payments": payments}


def killed(play: Callable[[Path, Killer], None], folder: Path, at: int, mode: str) -> bool:
    """Whether a child that plays the story there was killed; otherwise there is no such point any more."""
    child = os.fork()
    if not child:
        code = 1
        try:
            play(folder, Killer(at, mode))
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"{folder}: the story failed"
    return os.WIFSIGNALED(status)


def main(root: Path, play: Callable[[Path, Killer], None]) -> None:
    for mode in MODES:
        at = 1
        while True:
            folder = root / f"{mode}-{at:03}"
            folder.mkdir(mode=0o700)
            if not killed(play, folder, at, mode):
                shutil.rmtree(folder)
                break
            # ... and some again, while the next process repairs what this one left.
            for again in range(1, 9) if mode == "half" and at % 5 == 0 else ():
                twice = root / f"twice-{at:03}-{again}"
                shutil.copytree(folder, twice)
                killed(play, twice, again, mode)
            at += 1
        print(mode, at - 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), STORIES[sys.argv[2]])
