"""Fair turns: sessions that have work share one thread, a slice of time each, in a ring.

One thread, since two that run Python fight for the interpreter lock; a kernel uses as many intra-op threads as
the worker is given. A session with a thousand frames queued waits as long for its next slice as one with a
single call waits for its first: at most `slice_s` and one operator for each session before it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from ..program.run import computing

__all__ = ["Job", "Turns"]


class Job(Protocol):
    """Whose turn it may be."""

    def steps(self) -> Iterator[None] | None:
        """The work to go on with, step by step; `None` if there is none just now."""

    def failed(self, error: Exception) -> None:
        """A step raised what no step should: the job has to see that it is not given another."""


class Turns:
    """Runs jobs in turn on a thread of its own, until `close`. `threads` is torch's, within one operation; 0 leaves
    it as it is. `busy_s` is the time spent so far."""

    def __init__(self, threads: int = 0, slice_s: float = 0.02, clock: Callable[[], float] = time.perf_counter) -> None:
        self.busy_s = 0.0
        self._threads, self._slice_s, self._clock = threads, slice_s, clock
        self._changed = threading.Condition()
        self._ring: deque[Job] = deque()
        self._waiting: set[int] = set()  # ids of the jobs in the ring
        self._running = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="housecall-turns", daemon=True)
        self._thread.start()

    def add(self, job: Job) -> None:
        """A job has work. Adding one that waits already changes nothing."""
        with self._changed:
            if id(job) not in self._waiting:
                self._waiting.add(id(job))
                self._ring.append(job)
                self._changed.notify_all()

    def wait_idle(self, timeout: float | None = None) -> bool:
        """Wait until no job has work; whether that came to pass within `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._ring and not self._running, timeout)

    def close(self, timeout: float | None = None) -> bool:
        """End after the present slice; what is left does not run. Whether it has ended within `timeout` seconds: an
        operator that runs cannot be stopped."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)  # torch keeps it for each thread
        while True:
            with self._changed:
                self._running = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._ring or self._closed)
                if self._closed:
                    return
                job = self._ring.popleft()
                self._waiting.discard(id(job))
                self._running = True
            if self._slice(job):
                self.add(job)

    def _slice(self, job: Job) -> bool:
        """One slice of a job; whether it has more to do."""
        started = self._clock()
        try:
            return self._until(job, started + self._slice_s)
        except Exception as error:  # one job's: the others have their turns
            job.failed(error)
            return False
        finally:
            self.busy_s += self._clock() - started

    def _until(self, job: Job, end: float) -> bool:
        while (steps := job.steps()) is not None:
            with computing():
                for _ in steps:
                    if self._clock() >= end:
                        return True
        return False
