"""Bounds that the kernel keeps: no core dumps, files, open files, threads, memory (RLIMIT).

Computing time is not among them: a worker runs for months. `limits.compute_s` bounds what a session may use.
"""

from __future__ import annotations

import resource

from .kernel import reason
from .report import Protection

__all__ = ["FILE_BYTES", "OPEN_FILES", "THREADS", "bound"]

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
