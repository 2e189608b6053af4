"""Where a ledger's lines lie: numbered files that only grow, or memory. A line is on the disk when `add` returns.

What must live here: bytes, files, the lock, and what a crash can leave of them. What must not: what a line says, hashes
and signatures.

NOTE [What lies in the folder]
    ledger/000001.jsonl       entries, one a line; the last file grows until it is full, then the next one begins
    ledger/heads.jsonl        a signed head for each entry, written after the entry is on the disk
    ledger/countersigned.jsonl  heads that others signed too
    ledger/ledger.pub         the key that signs, for those who verify; written last, when all the above can be opened
    ledger.key                its private half, beside the folder and not in it: the folder can be handed to an auditor

NOTE [What a crash can leave]
Of the entries: one line without its end, in the last file, which nobody was told is there. Of the heads: fewer than
there are entries, by one when the process was killed and by at most `LAG` when the power failed, since heads are synced
only now and then, and one without its end. Anything else was not left by a crash.

NOTE [fsync that failed]
After a failed fsync a kernel may hold pages that it takes for written and that are not (Rebello et al. 2020, "Can
Applications Recover from fsync Failures?"). So a writer that failed never goes on, and the next one writes the last
line again before it adds another.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from ..errors import LedgerError
from .files import locked, make_folder, replace

if sys.platform != "win32":
    import fcntl

__all__ = ["LAG", "MAX_LINE", "Files", "Journal", "Line", "Memory", "Pen", "Writable"]

LEDGER_FOLDER = "ledger"
PUBLIC_FILE = "ledger.pub"
_HEADS = "heads.jsonl"
_KEPT = "countersigned.jsonl"
_ENTRIES = re.compile(r"[0-9]{6}\.jsonl", re.ASCII)
_PUBLIC = re.compile(rb"[0-9a-f]{64}\n")

MAX_LINE = 64 << 10  # bytes; a common entry has 450
FILE_BYTES = 16 << 20
_SYNC_HEADS = 64
LAG = _SYNC_HEADS + 1  # heads that a power cut may lose: those not synced, and the one that was to come

_MODE = 0o600
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_FLAGS = os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) if sys.platform != "win32" else 0

Write = Callable[[int, bytes], int]
Sync = Callable[[int], None]


class Line(NamedTuple):
    """A line without its end: where it stands, its first byte's place in the file, and whether its end was there."""

    place: str
    start: int
    raw: bytes
    whole: bool = True


class Journal(Protocol):
    """A ledger's lines, to read at any time."""

    def heads(self) -> Iterator[Line]:
        """Those there are now: the call looks, not the iteration. Heads are read first: there are never more of
        them than of entries."""

    def lines(self) -> Iterator[Line]:
        """The entries, in order."""

    def kept(self) -> list[Line]:
        """The countersigned heads."""

    def keep(self, line: bytes) -> None:
        """Add a countersigned head."""

    def still(self) -> contextlib.AbstractContextManager[bool]:
        """Within: whether there is no writer, and none can begin."""


class Writable(Journal, Protocol):
    """A ledger's lines, to add to, by one writer at a time."""

    def mend(self, torn: Line | None, last: Line | None, torn_head: Line | None) -> None:
        """Prepare for adding: cut off what a crash left unfinished, and have the rest on the disk. Called once."""

    def add(self, line: bytes) -> None:
        """Add an entry: on the disk when this returns. Raises `OSError`; then nothing may be added any more."""

    def add_head(self, line: bytes) -> None:
        """Add a head; it reaches the disk by and by."""

    def flush(self) -> None:
        """Have the heads on the disk."""

    def close(self) -> None:
        """Add no more, and let others."""


class Memory:
    """A journal that ends with its process."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []
        self._heads: list[bytes] = []
        self._kept: list[bytes] = []

    def heads(self) -> Iterator[Line]:
        """As `Journal`; so are all others."""
        return _in_memory("head", self._heads, len(self._heads))

    def lines(self) -> Iterator[Line]:  # noqa: D102  # Journal says it
        return _in_memory("entry", self._lines, len(self._lines))

    def kept(self) -> list[Line]:  # noqa: D102  # Journal says it
        return list(_in_memory("countersigned head", self._kept, len(self._kept)))

    def keep(self, line: bytes) -> None:  # noqa: D102  # Journal says it
        self._kept.append(line)

    @contextlib.contextmanager
    def still(self) -> Iterator[bool]:  # noqa: D102  # Journal says it
        yield False

    def mend(self, torn: Line | None, last: Line | None, torn_head: Line | None) -> None:  # noqa: D102  # Journal says it
        assert torn is None  # there is nothing to recover: memory does not outlive its process
        assert torn_head is None

    def add(self, line: bytes) -> None:  # noqa: D102  # Journal says it
        self._lines.append(line)

    def add_head(self, line: bytes) -> None:  # noqa: D102  # Journal says it
        self._heads.append(line)

    def flush(self) -> None:  # noqa: D102  # Journal says it
        return

    def close(self) -> None:  # noqa: D102  # Journal says it
        return


def _in_memory(kind: str, lines: list[bytes], count: int) -> Iterator[Line]:
    return (Line(f"{kind} {number + 1}", 0, lines[number]) for number in range(count))


class Files:
    """The journal in `folder`/ledger, to read while another process may write it.

    Reading raises `LedgerError` where files are missing, unreadable or not such files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / LEDGER_FOLDER

    def heads(self) -> Iterator[Line]:
        """As `Journal`; so are all others."""
        path = self.folder / _HEADS
        try:
            size = path.stat().st_size
        except OSError as error:
            raise self._unreadable(path, error) from None
        return self._read(path, size)

    def lines(self) -> Iterator[Line]:  # noqa: D102  # Journal says it
        files = self.files()
        for path in files:
            for line in self._read(path, None):
                if not line.whole and path != files[-1]:
                    raise LedgerError(f"{line.place} has no end, and {files[-1].name} follows: it was cut")
                yield line

    def kept(self) -> list[Line]:  # noqa: D102  # Journal says it
        path = self.folder / _KEPT
        lines = list(self._read(path, path.stat().st_size)) if path.exists() else []
        if lines and not lines[-1].whole:
            raise LedgerError(f"{lines[-1].place} has no end: it was cut")
        return lines

    def keep(self, line: bytes) -> None:  # noqa: D102  # Journal says it
        try:
            with locked(self.folder / f".{_KEPT}"):
                replace(self.folder / _KEPT, b"".join(one.raw + b"\n" for one in self.kept()) + line + b"\n")
        except OSError as error:
            raise LedgerError(f"{self.folder / _KEPT} cannot be written: {error.strerror}") from None

    @contextlib.contextmanager
    def still(self) -> Iterator[bool]:  # noqa: D102  # Journal says it
        handle = self._lock(shared=True)
        try:
            yield handle is not None
        finally:
            if handle is not None:
                os.close(handle)

    def files(self) -> list[Path]:
        """The files of entries, in order; none is missing between."""
        try:
            found = sorted(path for path in self.folder.iterdir() if _ENTRIES.fullmatch(path.name))
        except OSError as error:
            raise self._unreadable(self.folder, error) from None
        for number, path in enumerate(found, 1):
            if path.name != f"{number:06}.jsonl":
                raise LedgerError(f"{self.folder / f'{number:06}.jsonl'} is missing, though {path.name} is there")
        return found

    def public(self) -> bytes | None:
        """The key that signs, `None` where no ledger was begun."""
        path = self.folder / PUBLIC_FILE
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unreadable(path, error) from None
        if not _PUBLIC.fullmatch(text):
            raise LedgerError(f"{path} holds no key: expected the 64 hexadecimal digits of an Ed25519 public key")
        return bytes.fromhex(text.decode())

    def _read(self, path: Path, size: int | None) -> Iterator[Line]:
        """The lines of a file, of its first `size` bytes if that is given."""
        name = f"{LEDGER_FOLDER}/{path.name}"
        try:
            with open(os.open(path, os.O_RDONLY | _FLAGS), "rb") as file:
                start = number = 0
                while raw := file.readline(MAX_LINE + 1 if size is None else min(MAX_LINE + 1, size - start)):
                    number += 1
                    if len(raw) > MAX_LINE:
                        raise LedgerError(f"{name} line {number} has more than {MAX_LINE:,} bytes: it is no entry")
                    yield Line(f"{name} line {number}", start, raw.removesuffix(b"\n"), raw.endswith(b"\n"))
                    start += len(raw)
        except OSError as error:
            raise self._unreadable(path, error) from None

    def _lock(self, *, shared: bool) -> int | None:
        """A handle that holds the folder's lock until it is closed, `None` if somebody else holds it."""
        if sys.platform == "win32":
            raise LedgerError(
                "a ledger on disk needs flock, which Windows lacks: keep it in memory, or use Linux or macOS"
            )
        handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | _FLAGS)
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        return handle

    def _unreadable(self, path: Path, error: OSError) -> LedgerError:
        if isinstance(error, FileNotFoundError):
            return LedgerError(f"{path} is missing: there is no ledger, or a part of it was deleted")
        return LedgerError(f"{path} cannot be read: {error.strerror}")


class Pen(Files):
    """The journal in `folder`/ledger, to add to: the only one at a time. Folder and files are made if there are none.

    `write` and `sync` are `os.write` and `os.fsync`. Raises `LedgerError` if another process writes, or others than
    this user may touch a file."""

    def __init__(
        self,
        folder: Path,
        public: bytes,
        *,
        file_bytes: int = FILE_BYTES,
        write: Write = os.write,
        sync: Sync = os.fsync,
    ) -> None:
        super().__init__(folder)
        self._file_bytes, self._write, self._sync = file_bytes, write, sync
        self._file = self._head_file = -1
        self._number = self._size = self._unsynced = 0
        try:
            make_folder(self.folder)
            lock = self._lock(shared=False)
        except OSError as error:
            raise LedgerError(f"{self.folder} cannot be opened: {error.strerror}") from None
        if lock is None:
            raise LedgerError(f"{self.folder} is being written, or verified, by another process: wait until it is done")
        self._folder = lock
        try:
            self._begin(folder, public)
        except OSError as error:
            self.close()
            raise LedgerError(f"{self.folder} cannot be opened to write: {error.strerror}") from None
        except BaseException:
            self.close()
            raise

    def _begin(self, folder: Path, public: bytes) -> None:
        begun = self.public()
        files = self.files()
        if begun is None:
            self._create(folder, public)
        elif begun != public:
            raise LedgerError(
                f"{self.folder / PUBLIC_FILE} is not of the key that is to sign: one of them was exchanged"
            )
        elif not files:
            raise LedgerError(
                f"{self.folder / '000001.jsonl'} is missing: a ledger was begun here, and its entries deleted"
            )
        self._number = max(1, len(files))
        self._head_file = self._open(_HEADS)
        self._file = self._open(f"{self._number:06}.jsonl")

    def _create(self, folder: Path, public: bytes) -> None:
        """The key comes last: while it is missing there is no ledger, and a crash left nothing but empty files."""
        for name in (_HEADS, "000001.jsonl"):
            handle = self._open(name, os.O_CREAT)
            size = os.fstat(handle).st_size
            os.close(handle)
            if size:
                raise LedgerError(f"{self.folder / PUBLIC_FILE} is missing, though {name} has entries: it was deleted")
        self._sync(self._folder)
        replace(self.folder / PUBLIC_FILE, f"{public.hex()}\n".encode())
        parent = os.open(folder, os.O_RDONLY)
        try:
            self._sync(parent)
        finally:
            os.close(parent)

    def _open(self, name: str, flags: int = 0) -> int:
        handle = os.open(self.folder / name, os.O_RDWR | _FLAGS | flags, _MODE)
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
        if mode & _OTHERS:
            os.close(handle)
            path = self.folder / name
            raise LedgerError(f"others may touch {path} (mode {mode:04o}, expected 0600): run `chmod 600 {path}`")
        return handle

    def mend(self, torn: Line | None, last: Line | None, torn_head: Line | None) -> None:  # noqa: D102  # Journal says it
        if torn is not None:
            os.ftruncate(self._file, torn.start)
        if torn_head is not None:
            os.ftruncate(self._head_file, torn_head.start)
        self._size = os.lseek(self._file, 0, os.SEEK_END)
        if last is not None and last.place.startswith(f"{LEDGER_FOLDER}/{self._number:06}."):
            os.lseek(self._file, last.start, os.SEEK_SET)  # NOTE [fsync that failed]
            self._put(self._file, last.raw + b"\n")
        os.lseek(self._head_file, 0, os.SEEK_END)
        for handle in (self._file, self._head_file, self._folder):
            self._sync(handle)

    def add(self, line: bytes) -> None:  # noqa: D102  # Journal says it
        if self._size and self._size + len(line) >= self._file_bytes:
            self._next()
        self._put(self._file, line + b"\n")
        self._sync(self._file)
        self._size += len(line) + 1

    def add_head(self, line: bytes) -> None:  # noqa: D102  # Journal says it
        self._put(self._head_file, line + b"\n")
        self._unsynced += 1
        if self._unsynced >= _SYNC_HEADS:
            self.flush()

    def flush(self) -> None:  # noqa: D102  # Journal says it
        self._sync(self._head_file)
        self._unsynced = 0

    def close(self) -> None:  # noqa: D102  # Journal says it
        for handle in (self._file, self._head_file, self._folder):
            if handle >= 0:
                os.close(handle)
        self._file = self._head_file = self._folder = -1

    def _next(self) -> None:
        """Go on in a new file, whose name survives a power cut before anything is in it."""
        handle = self._open(f"{self._number + 1:06}.jsonl", os.O_CREAT | os.O_EXCL)
        os.close(self._file)
        self._file, self._number, self._size = handle, self._number + 1, 0
        self._sync(self._folder)

    def _put(self, handle: int, data: bytes) -> None:
        while data:
            data = data[self._write(handle, data) :]
