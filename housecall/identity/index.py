"""What an authority has issued, to whom, and whom it has invited: one JSON file, read anew for every question.

So a running server and a command beside it see the same. Each change happens under a lock between processes, on
the newest file, and is written whole or not at all. Secrets are not in it, only their hashes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import msgspec

from ..errors import IdentityError
from .files import locked, read, replace

__all__ = ["Index", "Invited", "Issued", "Record"]

MAX_BYTES = 256 << 20  # some million certificates


class Issued(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One certificate. `serial` is hexadecimal; `lifetime`, in seconds, is what a renewal gets as well."""

    serial: str
    name: str
    role: str
    hosts: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    lifetime: int
    revoked: datetime | None = None


class Invited(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One invitation; `digest` is the SHA-256 of its secret, hexadecimal. It ends by being used or withdrawn."""

    digest: str
    name: str
    role: str
    hosts: tuple[str, ...]
    expires: datetime
    used: datetime | None = None
    withdrawn: datetime | None = None


class Record(msgspec.Struct, forbid_unknown_fields=True):
    """All that an authority remembers besides its key and certificate."""

    version: int = 1
    url: str = ""
    crl_number: int = 0
    issued: list[Issued] = []
    invited: list[Invited] = []


class Index:
    """The record in a folder. Raises `IdentityError` where its file is missing or damaged."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "index.json"
        self._lock = folder / ".lock"

    def read(self) -> Record:
        """The record as it is now."""
        try:
            record = msgspec.json.decode(read(self._path, MAX_BYTES), type=Record)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise IdentityError(f"{self._path} is damaged ({error}): put back the copy that you keep") from None
        if record.version != 1:
            raise IdentityError(f"{self._path} has version {record.version}, expected 1: use a newer housecall")
        return record

    def create(self, record: Record) -> None:
        """The first record of a folder."""
        self._write(record)

    @contextmanager
    def changing(self) -> Iterator[Record]:
        """Within: the newest record, for one thread of one process. What is left in it at the end is written, unless
        an error leaves first."""
        with locked(self._lock):
            record = self.read()
            yield record
            self._write(record)

    def _write(self, record: Record) -> None:
        replace(self._path, msgspec.json.format(msgspec.json.encode(record), indent=1), private=True)
