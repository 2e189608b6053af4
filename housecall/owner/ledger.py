"""`Ledger`: the append-only account of what an owner's worker decided, and of all that may have left it.

What must live here: what an entry says, how entries are chained and signed, and how the whole is verified. What must
not: decisions (`gate`), what is spent (`spending`), how bytes reach the disk (`journal`).

NOTE [The chain]
A line is one entry in JSON: `sequence` from 1, `time`, `previous`, `entry`, `signature`.
- `previous` is the SHA-256 of the whole line before it, without its end (of `housecall ledger 1` before the first).
- `signature` is of a head (`heads`): the sequence, the time, and the SHA-256 of the line without the signature.
So each line vouches for all lines before it, their signatures among them, and verifying needs one SHA-256 for each line
and one signature for all: that of the last. Lines are canonical: one that does not come out the same, byte for byte,
when it is read and written again, was changed. After each entry its head is written to a second file, so that whoever
cuts the end of one is found by the other. Whoever cuts both alike is found by heads that others keep.

NOTE [What an entry proves]
It is on the disk before what it describes happens. So all that left is in the ledger; a crash in between leaves an
entry of something that did not happen. A ledger can say too much, never too little.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from ..errors import LedgerError
from .heads import Countersigned, Head, Hex32, Hex64, Signer, Time, signed, statement
from .journal import FILE_BYTES, LAG, MAX_LINE, Files, Journal, Line, Memory, Pen, Sync, Writable, Write

__all__ = ["Account", "Entry", "Head", "Ledger", "Privacy", "Sealed", "Verified"]

_log = logging.getLogger(__name__)

KEY_FILE = "ledger.key"
_GENESIS = hashlib.sha256(b"housecall ledger 1").hexdigest()
_SIGNATURE = b',"signature":"'

Kind = Literal[
    "request", "approval", "denial", "policy", "run", "release", "refusal", "reserve", "commit", "cancel", "recovered"
]


class Privacy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A privacy event: (epsilon, delta)-differential privacy of one `unit` (Dwork and Roth 2014, definition 2.4), or
    `rho`-zero-concentrated differential privacy of it (Bun and Steinke 2016, definition 1.1)."""

    epsilon: Annotated[float, Meta(ge=0, le=1e9)]
    delta: Annotated[float, Meta(ge=0, le=1)]
    unit: Literal["record", "person"] = "record"
    rho: Annotated[float, Meta(ge=0, le=1e9)] | UnsetType = UNSET  # so that the lines of before are canonical still


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing that was asked, decided, spent, or let out. `principal` is who (as in "scientist 'alice'"), `program`
    the digest of what ran, `pipeline` the stages that a value passed, `decision` the rule and its answer, `details` for
    the owner alone. `of` is the sequence number of the entry that this one answers: a release's reserve. `identity`
    says which data a reserve is of, whatever it is called; other entries do not have it."""

    kind: Kind
    principal: str = ""
    data_sets: tuple[str, ...] = ()
    program: str = ""
    pipeline: tuple[str, ...] = ()
    privacy: Privacy | None = None
    decision: str = ""
    details: str = ""
    of: Annotated[int, Meta(ge=1)] | None = None
    identity: str | UnsetType = UNSET  # so that the lines of before are canonical still


class _Body(msgspec.Struct, frozen=True):
    """What a line says, without its signature."""

    sequence: int
    time: datetime
    previous: str
    entry: Entry


class Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry in its place: see NOTE [The chain]."""

    sequence: Annotated[int, Meta(ge=1)]
    time: Time
    previous: Hex32
    entry: Entry
    signature: Hex64

    @property
    def hash(self) -> str:
        """The SHA-256, hexadecimal, of what the line says: what its head names."""
        return _hash(msgspec.json.encode(self))

    def head(self, public: bytes) -> Head:
        """The head of the ledger that ends with this entry, whose key is `public`."""
        return Head(self.sequence, self.hash, self.time, public.hex(), self.signature)


class Verified(msgspec.Struct, frozen=True):
    """What a verification found whole: `entries`, and the last one's `head`. It goes on from `known` heads that were
    given to it or kept.

    `pending` means that a writer was at work: its last lines were not acknowledged yet, and no part of this."""

    entries: int
    head: Head | None
    known: int = 0
    pending: bool = False


def _now() -> datetime:
    return datetime.now(UTC)


def _hash(line: bytes) -> str:
    """The SHA-256 of a line without its signature."""
    return hashlib.sha256(line[: line.rindex(_SIGNATURE)] + b"}").hexdigest()


class _Walk:
    """One pass over a journal, in the order of its lines: each is checked against the one before and its head.

    Iterating raises `LedgerError` at the first line that is wrong. Afterwards the attributes say where it ended."""

    def __init__(self, journal: Journal, public: bytes, expected: Iterable[tuple[str, Head]] = ()) -> None:
        self.sequence, self.link, self.lag = 0, _GENESIS, 0
        self.last: Line | None = None
        self.sealed: Sealed | None = None
        self.torn: Line | None = None
        self.torn_head: Line | None = None
        self._journal, self._public, self._heads = journal, public, journal.heads()
        self._expected: dict[int, list[tuple[str, Head]]] = {}
        for source, head in expected:
            self._expected.setdefault(head.sequence, []).append((source, head))

    def __iter__(self) -> Iterator[Sealed]:
        self._fits(0, _GENESIS)
        for line in self._journal.lines():
            if not line.whole:
                self.torn = self._unfinished(line)
                break
            yield self._take(line)
        self._end()

    @property
    def heads(self) -> int:
        """How many entries had their head."""
        return self.sequence - self.lag

    def run(self) -> _Walk:
        """Go over all lines."""
        for _ in self:
            pass
        return self

    def _take(self, line: Line) -> Sealed:
        sealed = _parse(line)
        self._in_order(line, sealed)
        self._follows(line, sealed)
        digest = _hash(line.raw)
        self._has_head(line, Head(sealed.sequence, digest, sealed.time, self._public.hex(), sealed.signature))
        self._fits(sealed.sequence, digest)
        self.sequence, self.link = sealed.sequence, hashlib.sha256(line.raw).hexdigest()
        self.last, self.sealed = line, sealed
        return sealed

    def _in_order(self, line: Line, sealed: Sealed) -> None:
        wanted = self.sequence + 1
        if sealed.sequence < wanted:
            raise LedgerError(f"{line.place} has entry {sealed.sequence} again, or late; expected entry {wanted}")
        if sealed.sequence > wanted:
            raise LedgerError(f"{line.place} has entry {sealed.sequence}, expected entry {wanted}: it is missing")

    def _follows(self, line: Line, sealed: Sealed) -> None:
        if sealed.previous == self.link:
            return
        if self.last is not None and self.sealed is not None and not self._is_signed(self.last, self.sealed):
            raise LedgerError(f"{self.last.place} was changed: its signature is not of what it says")
        raise LedgerError(f"{line.place} does not follow from the line before: one of the two was changed or put in")

    def _has_head(self, line: Line, head: Head) -> None:
        """Whether the next of the kept heads is this entry's."""
        if self.lag:
            self.lag += 1
            return
        found = next(self._heads, None)
        text = msgspec.json.encode(head)
        if found is None:
            self.lag = 1
        elif not found.whole and text.startswith(found.raw.rstrip(b"\0")) and next(self._heads, None) is None:
            self.torn_head, self.lag = found, 1
        elif not found.whole or found.raw != text:
            raise LedgerError(f"{found.place} is not the head of {line.place}: one of the two was changed")

    def _unfinished(self, line: Line) -> Line:
        """A line without its end is what a write left that was killed, if it begins as the next line would."""
        begins = f'{{"sequence":{self.sequence + 1},"time":"'.encode()
        found = line.raw.rstrip(b"\0")[: len(begins)]
        if not begins.startswith(found):
            raise LedgerError(
                f"{line.place} has no end, and does not begin as entry {self.sequence + 1}: it was changed"
            )
        return line

    def _end(self) -> None:
        if not self.lag:
            further = next(self._heads, None)
            if further is not None:
                raise LedgerError(
                    f"{further.place} is of an entry after {self.sequence}, where the ledger ends: "
                    "later entries were cut off or changed"
                )
        if self.last is not None and self.sealed is not None and not self._is_signed(self.last, self.sealed):
            raise LedgerError(_first_unsigned(self._journal, self._public))
        for sequence, known in self._expected.items():
            if sequence > self.sequence:
                raise LedgerError(
                    f"the ledger ends with entry {self.sequence}, but {known[0][0]} is of entry {sequence}: "
                    "entries were cut off"
                )

    def _fits(self, sequence: int, digest: str) -> None:
        for source, head in self._expected.get(sequence, ()):
            if not head.signed_by(self._public):
                raise LedgerError(f"{source} (of entry {sequence}) is not signed by this ledger's key")
            if head.hash != digest:
                raise LedgerError(f"entry {sequence} is not the one of which {source} is: history was rewritten")

    def _is_signed(self, line: Line, sealed: Sealed) -> bool:
        signature = bytes.fromhex(sealed.signature)
        return signed(self._public, sealed.sequence, _hash(line.raw), sealed.time, signature)


def _parse(line: Line) -> Sealed:
    try:
        sealed = msgspec.json.decode(line.raw, type=Sealed)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LedgerError(f"{line.place} is no entry: {error}") from None
    if msgspec.json.encode(sealed) != line.raw:
        raise LedgerError(f"{line.place} is not written as entries are: it was changed")
    return sealed


def _first_unsigned(journal: Journal, public: bytes) -> str:
    """The first line with a foreign signature. Only called where the last has one."""
    place = ""
    for line in journal.lines():
        sealed, place = _parse(line), line.place
        if not signed(public, sealed.sequence, _hash(line.raw), sealed.time, bytes.fromhex(sealed.signature)):
            break
    return f"{place} is not signed by this ledger's key: it was changed, or written by somebody else"


class Account:
    """A ledger, to read and verify. A worker may be writing it meanwhile.

    `public` is the key that must have signed it; without it, the one beside the ledger: then whoever could exchange
    both could write all of it anew. Raises `LedgerError` if there is no ledger in `folder`, a worker's."""

    def __init__(self, folder: str | os.PathLike[str], public: bytes | None = None) -> None:
        files = Files(Path(folder))
        beside = files.public()
        if beside is None:
            raise LedgerError(f"no ledger in {folder}: a worker begins one when it first runs")
        if public is not None and public != beside:
            raise LedgerError(f"the ledger in {folder} has key {beside.hex()}, expected {public.hex()}")
        self._journal: Journal = files
        self.public = beside

    def entries(self) -> Iterator[Sealed]:
        """All entries in order, each checked against the one before. Raises `LedgerError` at the first wrong one."""
        return iter(_Walk(self._journal, self.public))

    def head(self) -> Head:
        """The head of the last entry; all before is verified. Raises `LedgerError` as `verify`, or if it is empty."""
        head = self.verify().head
        if head is None:
            raise LedgerError("the ledger has no entries yet, and so no head")
        return head

    def verify(self, extends: Head | Iterable[Head] = ()) -> Verified:
        """Check every byte, and that the heads in `extends`, kept from earlier, are of this history.

        Raises `LedgerError` naming the first line that is wrong: changed, missing, twice, out of order, cut off, or
        signed by another key."""
        known = self._known(extends)
        walk = _Walk(self._journal, self.public, known).run()
        if walk.torn is None and not walk.lag:
            return self._verified(walk, known)
        with self._journal.still() as still:
            again = _Walk(self._journal, self.public, known).run()
            if still and again.torn is not None:
                raise LedgerError(f"{again.torn.place} has no end: a crash left it, or it was cut. {_REOPEN}")
            # Each head is written before the next entry is: only the last entry of the first walk may have had none.
            if again.lag if still else again.heads < walk.sequence - 1:
                raise LedgerError(f"{_missing_heads(again)} {_REOPEN}")
        return self._verified(again, known)

    def keep(self, seen: Countersigned) -> None:
        """Keep a head that somebody countersigned: from now on `verify` asks for it. Raises `LedgerError` if it is none
        of this ledger."""
        checked = Countersigned.parse(seen.text())
        self.verify(extends=checked.head)
        self._journal.keep(msgspec.json.encode(checked))

    def kept(self) -> tuple[Countersigned, ...]:
        """The countersigned heads that were kept. Raises `LedgerError` if one was changed."""
        return tuple(_kept(line) for line in self._journal.kept())

    def _known(self, extends: Head | Iterable[Head]) -> list[tuple[str, Head]]:
        given = (extends,) if isinstance(extends, Head) else tuple(extends)
        kept = [(f"{line.place}, a countersigned head,", _kept(line).head) for line in self._journal.kept()]
        return kept + [("the head that was kept", head) for head in given]

    def _verified(self, walk: _Walk, known: list[tuple[str, Head]]) -> Verified:
        head = walk.sealed.head(self.public) if walk.sealed is not None else None
        return Verified(walk.sequence, head, len(known), walk.torn is not None or bool(walk.lag))


_REOPEN = "A worker that opens the ledger repairs what a crash left, and records it."


def _missing_heads(walk: _Walk) -> str:
    return f"the heads of the last {walk.lag} entries are missing: lost in a crash, or cut off."


def _kept(line: Line) -> Countersigned:
    found = Countersigned.parse(line.raw, line.place)
    if msgspec.json.encode(found) != line.raw:
        raise LedgerError(f"{line.place} is not written as such heads are: it was changed")
    return found


class Ledger(Account):
    """A ledger, to write: one writer at a time, from any of its threads. In memory if `folder` (a worker's) is None.

    `key` signs; without it, `ledger.key` in the folder, made with the ledger. `clock` gives the time, `write` and
    `sync` are `os.write` and `os.fsync`. Opening reads and verifies all of it, repairs what a crash left, and raises
    `LedgerError` for any other damage: a ledger that cannot be trusted is not continued."""

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        clock: Callable[[], datetime] = _now,
        key: Signer | None = None,
        file_bytes: int = FILE_BYTES,
        write: Write = os.write,
        sync: Sync = os.fsync,
    ) -> None:
        if folder is None:
            self._key = key or Signer.generate()
            self._pen: Writable = Memory()
        else:
            self._key = key or _own_key(Path(folder))
            self._pen = Pen(Path(folder), self._key.public, file_bytes=file_bytes, write=write, sync=sync)
        self._journal, self.public = self._pen, self._key.public
        self._sequence, self._link = 0, _GENESIS
        self._head: Head | None = None
        self._clock, self._lock, self._process = clock, threading.Lock(), os.getpid()
        self._fault = ""
        try:
            self._open()
        except OSError as error:
            self._pen.close()
            raise LedgerError(f"the ledger in {folder} cannot be written: {error.strerror}") from None
        except BaseException:
            self._pen.close()
            raise

    def append(self, entry: Entry) -> Sealed:
        """Add an entry. When this returns it is on the disk, and only then may happen what it describes.

        Raises `LedgerError` if it cannot be written; then the ledger takes no more until it is opened again, since what
        lies on the disk is not known. An entry that is none, or too long, is refused and changes nothing."""
        with self._lock:
            self._check_open()
            line, sealed = self._seal(_plain(entry))
            head = sealed.head(self.public)
            self._fault = "an entry before this one was interrupted while it was written"
            try:
                self._pen.add(line)
                self._pen.add_head(msgspec.json.encode(head))
            except OSError as error:
                self._fault = f"an entry could not be written ({error.strerror})"
                raise LedgerError(f"the ledger cannot be written: {error.strerror}. {_FAULT}") from None
            self._sequence, self._link, self._head = sealed.sequence, hashlib.sha256(line).hexdigest(), head
            self._fault = ""
        return sealed

    def head(self) -> Head:
        """The head of the last entry that was acknowledged. Raises `LedgerError` for an empty ledger."""
        if self._head is None:
            raise LedgerError("the ledger has no entries yet, and so no head")
        return self._head

    def verify(self, extends: Head | Iterable[Head] = ()) -> Verified:
        """As `Account.verify`, while others may append: all that was acknowledged until now is there."""
        acknowledged, known = self._head, self._known(extends)
        own = [] if acknowledged is None else [("the last head", acknowledged)]
        walk = _Walk(self._journal, self.public, known + own).run()
        if acknowledged is not None and walk.heads < acknowledged.sequence:
            raise LedgerError(_missing_heads(walk))
        return self._verified(walk, known)

    def close(self) -> None:
        """Add no more; let another process write. Closing twice is harmless."""
        with self._lock:
            if self._fault != _CLOSED:
                self._close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _close(self) -> None:
        try:
            if not self._fault:
                self._pen.flush()
        except OSError as error:
            raise LedgerError(f"the ledger's heads cannot be written: {error.strerror}") from None
        finally:
            self._pen.close()
            self._fault = _CLOSED

    def _open(self) -> None:
        """Verify, then repair and record what a crash left: see NOTE [What a crash can leave] in `journal`."""
        walk = _Walk(self._journal, self.public, self._known(()))
        behind: list[bytes] = []
        for sealed in walk:
            if walk.lag:
                behind.append(msgspec.json.encode(sealed.head(self.public)))
                del behind[: -LAG - 1]
        if walk.lag > LAG:
            raise LedgerError(f"{_missing_heads(walk)} A crash loses {LAG} at most: somebody cut them off")
        self._pen.mend(walk.torn, walk.last, walk.torn_head)
        for head in behind:
            self._pen.add_head(head)
        if behind:
            self._pen.flush()
        self._sequence, self._link = walk.sequence, walk.link
        self._head = walk.sealed.head(self.public) if walk.sealed is not None else None
        found = _recovered(walk.torn, len(behind))
        if found:
            _log.warning("the ledger was not closed: %s", found)
            self.append(Entry("recovered", decision="repaired what a crash left", details=found))

    def _seal(self, entry: Entry) -> tuple[bytes, Sealed]:
        now = self._clock()
        if now.tzinfo is None:
            raise LedgerError("the ledger's clock gives a time without a zone: expected one, such as UTC")
        sequence, time = self._sequence + 1, now.astimezone(UTC)
        body = msgspec.json.encode(_Body(sequence, time, self._link, entry))
        signature = self._key.sign(statement(sequence, hashlib.sha256(body).hexdigest(), time)).hex()
        line = body[:-1] + _SIGNATURE + signature.encode() + b'"}'
        if len(line) >= MAX_LINE:
            raise LedgerError(f"an entry has {len(line):,} bytes, expected fewer than {MAX_LINE:,}: shorten its texts")
        return line, Sealed(sequence, time, self._link, entry, signature)

    def _check_open(self) -> None:
        if self._fault:
            raise LedgerError(f"the ledger takes no entries: {self._fault}. {_FAULT}")
        if os.getpid() != self._process:
            raise LedgerError("the ledger was opened by another process, of which this one is a copy: it may only read")


_CLOSED = "it was closed"
_FAULT = "Nothing may leave until it was opened again."


def _recovered(torn: Line | None, behind: int) -> str:
    cut = (
        ""
        if torn is None
        else (
            f"cut {len(torn.raw)} bytes of {torn.place} that were never acknowledged, "
            f"SHA-256 {hashlib.sha256(torn.raw).hexdigest()}"
        )
    )
    heads = f"wrote {behind} heads that were missing" if behind else ""
    return "; ".join(filter(None, (cut, heads)))


def _plain(entry: Entry) -> Entry:
    """The entry as it will be read: numbers of their types, sequences as tuples. Raises `LedgerError` if it is none."""
    try:
        return msgspec.json.decode(msgspec.json.encode(entry), type=Entry)
    except (msgspec.MsgspecError, UnicodeError, TypeError, ValueError) as error:
        raise LedgerError(f"this cannot be an entry: {error}") from None


def _own_key(folder: Path) -> Signer:
    """The key in a worker's folder, made if no ledger was begun there."""
    path = folder / KEY_FILE
    try:
        return Signer.load(path)
    except FileNotFoundError:
        if Files(folder).public() is not None:
            raise LedgerError(f"{path} is missing: without it the ledger beside it cannot be continued") from None
    return Signer.create(path)
