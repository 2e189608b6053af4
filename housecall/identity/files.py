"""Files at rest: each appears whole or not at all, a key is its owner's alone, and one process changes at a time."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import IdentityError

__all__ = ["locked", "make_folder", "read", "read_private", "replace"]

PUBLIC, PRIVATE = 0o644, 0o600
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def make_folder(folder: Path) -> None:
    """Make a folder that only its owner can enter; one that is there stays as it is."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def replace(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write a file, or put it in the place of the one that is there: whole, on disk, and with its mode from the start.

    A private one is readable by its owner alone (mode 0600)."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, PRIVATE if private else PUBLIC)
            file.write(data)
            file.flush()
            os.fsync(handle)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _settle(path.parent)


def _settle(folder: Path) -> None:
    """Have the new name of a file survive a power cut, not only its bytes."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: Path, limit: int) -> bytes:
    """The bytes of a file. Raises `IdentityError` if it is missing, unreadable or has more than `limit` bytes."""
    return _read(path, limit, private=False)


def read_private(path: Path, limit: int) -> bytes:
    """The bytes of a file that holds a key. Raises `IdentityError` as well if anyone but its owner may touch it."""
    return _read(path, limit, private=True)


def _read(path: Path, limit: int, *, private: bool) -> bytes:
    try:
        with path.open("rb") as file:
            # Of the open file, not of its name, which may mean another file by now.
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if private and mode & _OTHERS:
                raise IdentityError(
                    f"{path} holds a private key and others may touch it (mode {mode:04o}, expected 0600): "
                    f"if nobody has read it, run `chmod 600 {path}`; else have the certificate revoked and enrol anew"
                )
            data = file.read(limit + 1)
    except OSError as error:
        raise IdentityError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > limit:
        raise IdentityError(f"{path} has more than {limit} bytes: it is not what was expected there")
    return data


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within: no other thread or process is within for the same path. The lock ends with its process, however
    that ends."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
