"""One worker of a folder at a time: a lock on `host.lock`, which the kernel gives back however its process ends.

It says as well whether a worker runs at all: a process's number may be another's by now, a lock is nobody else's.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from ..errors import UsageError

__all__ = ["LOCK_FILE", "hold", "is_held", "let_go"]

LOCK_FILE = "worker.lock"


def hold(folder: Path) -> int:
    """Take a folder's lock; what `let_go` gives back. Raises `UsageError` if another worker has it."""
    path = folder / LOCK_FILE
    try:
        # Not to be read: within the sandbox a file that is made next to a secret can only be written.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise UsageError(f"a worker runs in {folder} already: `housecall worker status --folder {folder}`") from None
    return handle


def let_go(handle: int) -> None:
    """Give the lock back."""
    os.close(handle)


def is_held(folder: Path) -> bool:
    """Whether a worker of this folder runs. Raises `PermissionError` for whoever may not know."""
    try:
        handle = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
