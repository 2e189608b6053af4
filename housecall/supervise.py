"""The parent of a worker's process: starts it, starts it anew when it dies, and ends when it ends.

A process that computes for strangers can be killed by the kernel for its memory, or by a fault in a library. What it
held is lost then, but its owner's data should not be out of reach until somebody looks. The parent reads no data,
opens no socket and imports no torch; it is what signals are sent to, and passes them on.

NOTE [What is not started anew]
A process that ended as it was told to (status 0), and one that said what its owner has to mend (status 2): it would
only say so again. One that dies soon after each start is given up after `most` times.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

__all__ = ["USAGE", "supervise"]

USAGE = 2  # the status of a process that ended with a message for its owner
QUICK_S = 60.0  # who lives for less has died at once
MOST = 5
FIRST_DELAY, LONGEST_DELAY = 1.0, 30.0

log = logging.getLogger(__name__)


def supervise(
    command: Callable[[int, str], Sequence[str]],
    environment: Mapping[str, str],
    *,
    quick_s: float = QUICK_S,
    most: int = MOST,
    first_delay: float = FIRST_DELAY,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Run `command(restarts, how the last one died)` until it ends by itself or is told to; the status to exit with.

    Call it on the main thread: SIGTERM, SIGINT and SIGHUP are for the child from then on, as SIGTERM. A second SIGTERM
    or SIGINT is, as SIGINT: the child then ends at once."""
    child = _Child(environment)
    restarts, quick, died = 0, 0, ""
    while True:
        began = clock()
        status = child.run(command(restarts, died))
        if child.stopping.is_set():
            return max(status, 0)
        if status in (0, USAGE):
            return status
        lived = clock() - began
        died = _how(status)
        quick = quick + 1 if lived < quick_s else 1
        if quick >= most:
            log.error(
                "the worker's process %s; that was %d times, each within %g s of its start: it is not started again. "
                "What it said last stands above",
                died, quick, quick_s,
            )  # fmt: skip
            return 1
        delay = min(first_delay * 2 ** (quick - 1), LONGEST_DELAY)
        log.error("the worker's process %s after %.0f s; it is started anew in %g s", died, lived, delay)
        if child.stopping.wait(delay):
            return 0
        restarts += 1


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"was killed by {name}" + (", perhaps for its memory" if name == "SIGKILL" else "")


class _Child:
    """The process that there is now, if any, and whether it is to end."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.stopping = threading.Event()
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._told)

    def run(self, command: Sequence[str]) -> int:
        """Run a command to its end; its status, negative for the signal that killed it."""
        # A terminal's Ctrl-C reaches the parent alone, which passes it on once.
        with subprocess.Popen(command, env=self._environment, start_new_session=True) as process:  # noqa: S603  # this program
            self._process = process
            if self.stopping.is_set():  # told to, just before
                process.terminate()
            try:
                return process.wait()
            finally:
                self._process = None

    def _told(self, number: int, frame: FrameType | None) -> None:
        again = self.stopping.is_set() and number != signal.SIGHUP  # a terminal that is closed may say that twice
        self.stopping.set()
        process = self._process
        if process is not None:
            process.send_signal(signal.SIGINT if again else signal.SIGTERM)
