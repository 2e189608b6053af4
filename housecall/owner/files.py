"""Files in a worker's folder: each appears whole or not at all, for this user only, changed by one at a time.

What must live here: how bytes reach the disk. What must not: what they mean. `identity/files.py` is the same for
identities, which know nothing of workers.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from ..errors import UsageError

if sys.platform != "win32":
    import fcntl

__all__ = ["create", "locked", "make_folder", "read", "replace"]

_MODE = 0o600
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def make_folder(folder: Path) -> None:
    """Make a folder that only its owner can enter; one that is there stays as it is."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def create(path: Path, data: bytes) -> None:
    """Write a new file, mode 0600. Raises `FileExistsError` if there is one of this name; it stays as it was."""
    draft = _draft(path, data)
    try:
        os.link(draft, path)  # fails where `os.replace` would not: on a name that is taken
    finally:
        draft.unlink()
    _settle(path.parent)


def replace(path: Path, data: bytes) -> None:
    """Write a file, mode 0600, or put it in the place of the one that is there: whole, and on the disk on return."""
    draft = _draft(path, data)
    try:
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _settle(path.parent)


def read(path: Path, limit: int, *, private: bool = False) -> bytes:
    """The bytes of a file. Raises `ValueError` if it has more than `limit`, or is private and others may touch it."""
    with path.open("rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)  # of the open file: its name may mean another by now
        if private and sys.platform != "win32" and mode & _OTHERS:
            raise ValueError(
                f"others may touch it (mode {mode:04o}, expected 0600): if nobody has, run `chmod 600 {path}`"
            )
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    return data


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within: no other thread or process is within for the same path. The lock ends with its process, however that
    ends. Raises `UsageError` where the system has no such lock: never without it in silence."""
    if sys.platform == "win32":
        raise UsageError(
            "this needs flock, which Windows lacks: keep it in memory, or run the worker on Linux or macOS"
        )
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _draft(path: Path, data: bytes) -> Path:
    """A file of this content beside `path`, under a name that nobody looks for, on the disk."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(handle)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return draft


def _settle(folder: Path) -> None:
    """Have the new name of a file survive a power cut, not only its bytes."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
