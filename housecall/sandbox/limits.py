"""Bounds that the kernel keeps: no core dumps, files, open files, threads, memory (RLIMIT).

Computing time is not among them: a worker runs for months. `limits.compute_s` bounds what a session may use.
"""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

from .kernel import reason
from .report import Protection

__all__ = ["FILE_BYTES", "OPEN_FILES", "THREADS", "bound", "most_memory_mb"]

FILE_BYTES = 4_000_000_000  # a worker writes its status, its ledger and its log, never data
OPEN_FILES = 8_192  # a connection each, and a few
THREADS = 16_384  # of all processes of this user together, which is how the kernel counts: against bombs only


def bound(memory_mb: int) -> Protection:
    """Lower the limits of this process for good. `memory_mb`: 10^6 bytes that it may allocate, thread stacks and
    private mappings included (RLIMIT_DATA); 0 for as much as there is."""
    wanted = {"CORE": 0, "FSIZE": FILE_BYTES, "NOFILE": OPEN_FILES, "NPROC": THREADS, "MSGQUEUE": 0, "RTPRIO": 0}
    if memory_mb:
        wanted["DATA"] = memory_mb * 1_000_000
    failed = [text for name, value in wanted.items() if (text := _lower(name, value))]
    if failed:
        return Protection("limits", False, "; ".join(failed))
    memory = f"{memory_mb:,} MB of memory" if memory_mb else "memory unbounded (sandbox.memory_mb = 0)"
    return Protection(
        "limits", True, f"no core dumps, files up to {FILE_BYTES // 10**6:,} MB, {OPEN_FILES:,} open files, {memory}"
    )


def most_memory_mb() -> int:
    """Nine tenths of what this machine has, or its container may use, in 10^6 bytes: the rest is for whoever has to see
    to a worker that wants more."""
    bytes_ = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container: version 2, or 1
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            bytes_ = min(bytes_, int((Path("/sys/fs/cgroup") / name).read_text()))
    return max(1, bytes_ * 9 // 10 // 1_000_000)


def _lower(name: str, value: int) -> str:
    """Lower one limit to `value`, or leave a lower one; why not, or an empty text."""
    number: int | None = getattr(resource, f"RLIMIT_{name}", None)
    if number is None:
        return "" if name in ("MSGQUEUE", "RTPRIO") else f"this system has no RLIMIT_{name}"
    most = resource.getrlimit(number)[1]
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    try:
        resource.setrlimit(number, (value, value))
    except OSError as error:
        return f"RLIMIT_{name}: {reason(error)}"
    except ValueError as error:
        return f"RLIMIT_{name}: {error}"
    return ""
