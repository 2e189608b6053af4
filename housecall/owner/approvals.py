"""`Requests`: what scientists ask an owner for, what she answers, and the approvals that her key signed.

What must live here: requests, answers, approvals, and that each approval is used no more often than it says. What must
not: policies (whether an approval counts is theirs to say), programs, values.

NOTE [What an approval is]
The owner's signature over who may have what, of which data sets, how often, and until when. What it names is a digest:
of the submission that may run, or of the exact values that may leave, both made by the worker and never by whoever
asks; and the SHA-256 of the text that she read, so an approval that she gave after reading another counts for nothing.
Since it is signed, nobody who can only write files can make or change one. How often it was used stands beside
it, counted under a lock and on the disk before `spend` returns: a crash can lose a use, never give one.

NOTE [What is shown to an owner]
A request is read in a terminal, so what is not printable is refused, and so are text directions that reorder a line.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, Protocol

import msgspec
from msgspec import Meta

from ..errors import LimitError, PolicyError, UsageError
from .files import locked, make_folder, read, replace
from .signing import SIGNATURE_BYTES, OwnerKey, verify

__all__ = ["APPROVAL_HOURS", "REQUEST_FOLDER", "REQUEST_FOLDERS", "Approval", "Request", "Requests"]

log = logging.getLogger(__name__)

REQUEST_FOLDER = "requests"
REQUEST_FOLDERS = (REQUEST_FOLDER, "approvals", "spent", "noted")
APPROVAL_HOURS = 24.0
MAX_REASON = 2_000  # characters
MAX_PROGRAM = 1_000_000  # bytes
MAX_PENDING = 20  # of one principal
MAX_PENDING_IN_ALL = 1_000
MAX_USES = 1_000_000
_DENIED = MAX_USES + 1  # uses of what was denied: more than any approval has
_MAX_FILE = 8 << 20  # a program of MAX_PROGRAM bytes, escaped, and the rest
_PURPOSE = b"housecall approval 1\0"
_ID = re.compile(r"[0-9a-f]{16}", re.ASCII)
_DIGEST = re.compile(r"[0-9A-Za-z._:/-]{1,200}", re.ASCII)

Kind = Literal["value", "program"]
_Sought = tuple[str, str, str, tuple[str, ...], str, str]  # see `_sought`
Time = Annotated[datetime, Meta(tz=True)]


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What somebody asks for. `kind` "value": to take the values that `digest` names, exactly; "program": to run the
    submission of this digest, `runs` times. `program` is its text (or that of the program that made the value), as the
    *worker* printed it. `words` are the owner's, if she gave any."""

    id: str
    principal: str
    role: str
    when: Time
    kind: Kind
    data_sets: tuple[str, ...]
    digest: str
    program: str
    reason: str
    status: Literal["pending", "approved", "denied"] = "pending"
    words: str = ""
    runs: Annotated[int, Meta(ge=1, le=MAX_USES)] = 1

    @property
    def shown(self) -> str:
        """The SHA-256 of the text that its owner reads."""
        return hashlib.sha256(self.program.encode("utf-8", "replace")).hexdigest()


class Approval(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An owner's signed word that a principal may have what a digest names, `uses` times before `expires`. `shown` is
    the SHA-256 of the text that she read. `release`: what the runs of a submission make may leave, exactly."""

    id: str
    principal: str
    role: str
    kind: Kind
    data_sets: tuple[str, ...]
    digest: str
    uses: Annotated[int, Meta(ge=1, le=MAX_USES)]
    expires: Time
    shown: str
    release: bool = False
    signature: str = ""

    def message(self) -> bytes:
        """What is signed: the purpose, then every field but the signature, in their order."""
        return _PURPOSE + msgspec.json.encode(msgspec.structs.replace(self, signature=""))

    def signed(self, key: OwnerKey) -> Approval:
        """The same, with the signature of `key`."""
        return msgspec.structs.replace(self, signature=key.sign(self.message()).hex())

    def genuine(self, public: bytes) -> bool:
        """Whether the owner whose public key this is signed just this."""
        if len(self.signature) != 2 * SIGNATURE_BYTES or not set(self.signature) <= set("0123456789abcdef"):
            return False
        return verify(public, self.message(), bytes.fromhex(self.signature))


class _Shelf(Protocol):
    """Where texts lie by name ("requests/ID.json"): each whole, one change at a time."""

    def names(self, folder: str) -> Iterable[str]:
        """The names in a folder."""

    def stamp(self, name: str) -> object:
        """Something that is equal only as long as the text is the same; `None` if there is none."""

    def stirred(self, folder: str) -> object:
        """Something that is equal only as long as nothing was written to the folder; `None` if that is not known."""

    def read(self, name: str) -> bytes:
        """Raises `FileNotFoundError`, or another `OSError` or `ValueError` for what cannot be read."""

    def write(self, name: str, data: bytes) -> None:
        """On return it is there for good."""

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Within: nobody else, in any thread or process."""


@contextlib.contextmanager
def _within(lock: threading.Lock) -> Iterator[None]:
    with lock:
        yield


class _Memory:
    """A shelf that ends with its process."""

    def __init__(self) -> None:
        self._texts: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._written = 0

    def names(self, folder: str) -> Iterable[str]:
        return [name for name in list(self._texts) if name.startswith(f"{folder}/")]

    def stamp(self, name: str) -> object:
        return self._texts.get(name)

    def stirred(self, folder: str) -> object:
        return self._written

    def read(self, name: str) -> bytes:
        if name not in self._texts:
            raise FileNotFoundError(name)
        return self._texts[name]

    def write(self, name: str, data: bytes) -> None:
        self._texts[name] = data
        self._written += 1

    def alone(self) -> contextlib.AbstractContextManager[None]:
        return _within(self._lock)


class _Folder:
    """A shelf in a worker's folder: files that only this user may read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self, folder: str) -> Iterable[str]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self._folder / folder) as entries:
            return [f"{folder}/{entry.name}" for entry in entries if entry.name.endswith(".json")]
        return []

    def stamp(self, name: str) -> object:
        try:
            status = (self._folder / name).stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def stirred(self, folder: str) -> object:
        """A folder's time changes with each name that is put in, but by ticks: one of now may see another write."""
        try:
            changed = (self._folder / folder).stat().st_mtime_ns
        except OSError:
            return None
        return changed if time.time_ns() - changed > 2_000_000_000 else None

    def read(self, name: str) -> bytes:
        return read(self._folder / name, _MAX_FILE)

    def write(self, name: str, data: bytes) -> None:
        path = self._folder / name
        make_folder(path.parent)
        replace(path, data)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        make_folder(self._folder / REQUEST_FOLDER)
        with locked(self._folder / REQUEST_FOLDER / ".lock"):
            yield


def _now() -> datetime:
    return datetime.now(UTC)


def _new_id() -> str:
    return secrets.token_hex(8)  # not a number in order: it would tell how many others ask


class Requests:
    """The requests at one worker, the answers, and the approvals: in `folder`, or in memory without one.

    `public` is the public half of the owner's key: what it did not sign is no approval. Several processes may use one
    folder (the worker that asks and spends, the owner's command line that answers)."""

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        public: bytes,
        *,
        clock: Callable[[], datetime] = _now,
        new_id: Callable[[], str] = _new_id,
        pending: int = MAX_PENDING,
    ) -> None:
        self._shelf: _Shelf = _Memory() if folder is None else _Folder(Path(folder))
        self._public, self._clock, self._new_id, self._limit = public, clock, new_id, pending
        # What was read, with its stamp, so that a look costs a `stat` for each file; requests without their programs.
        self._requests: dict[str, tuple[object, Request, _Sought]] = {}
        self._signed: dict[str, tuple[object, Approval | None]] = {}
        self._looked: object = None
        self._told: dict[str, str] = {}

    # -- asking -------------------------------------------------------------------------------------------

    def ask(
        self,
        principal: str,
        role: str,
        kind: Kind,
        data_sets: Iterable[str],
        digest: str,
        program: str,
        reason: str,
        runs: int = 1,
    ) -> Request:
        """Put a request before the owner. One that waits already for the same is returned as it stands.

        `digest` and `program` are the worker's own, never what came over the wire: the owner reads one and approves
        the other. Raises `UsageError` for what is too long or not printable, `LimitError` for too many that wait."""
        names = tuple(sorted(set(data_sets)))
        made = Request("", principal, role, self._time(), kind, names, digest, program, reason, runs=runs)
        _check(made)
        with self._shelf.alone():
            waiting = self._waiting()
            for request, sought in waiting:
                if (sought, request.runs) == (_sought(made), runs):
                    return self.get(request.id)
            if sum(request.principal == principal for request, _ in waiting) >= self._limit:
                raise LimitError(f"{self._limit} requests of '{principal}' wait for an answer: no more until then")
            if len(waiting) >= MAX_PENDING_IN_ALL:
                raise LimitError("too many requests wait at this worker: try again when its owner has answered some")
            made = msgspec.structs.replace(made, id=self._free())
            self._write(made)
        return made

    def pending(self) -> tuple[Request, ...]:
        """Those that nobody has answered, the oldest first."""
        return tuple(request for request in self.all() if request.status == "pending")

    def all(self) -> tuple[Request, ...]:
        """All that were ever made here, the oldest first. A file that is damaged is left out, and the log says so."""
        found = []
        for name in self._shelf.names(REQUEST_FOLDER):
            id_ = name.removeprefix(f"{REQUEST_FOLDER}/").removesuffix(".json")
            if _ID.fullmatch(id_):
                try:
                    found.append(self.get(id_))
                except PolicyError as error:
                    log.warning("%s", error)
        return tuple(sorted(found, key=lambda request: (request.when, request.id)))

    def get(self, id: str, principal: str | None = None, role: str | None = None) -> Request:
        """The request of this id; with `principal` and `role`, only if it is theirs: another's is as if it were not
        there. Raises `PolicyError`."""
        missing = PolicyError(f"there is no request {id[:40]!r}")
        if not _ID.fullmatch(id):
            raise missing
        try:
            found = msgspec.json.decode(self._shelf.read(f"{REQUEST_FOLDER}/{id}.json"), type=Request)
        except FileNotFoundError:
            raise missing from None
        except (OSError, ValueError) as error:
            raise PolicyError(f"request {id} cannot be read: {error}") from None
        if found.id != id:
            raise PolicyError(f"request {id} cannot be read: it says that it is {found.id[:40]!r}")
        if principal not in (None, found.principal) or role not in (None, found.role):
            raise missing
        return found

    # -- answering ----------------------------------------------------------------------------------------

    def approve(
        self,
        id: str,
        key: OwnerKey,
        uses: int = 1,
        expires: datetime | None = None,
        words: str = "",
        *,
        release: bool = False,
    ) -> Approval:
        """Sign that whoever asked may have it, `uses` times before `expires` (in 24 hours, unless said). `release`:
        and what the program makes may leave.

        Raises `PolicyError` if it was answered already, or `key` is not this worker's owner's."""
        expires = self._time() + timedelta(hours=APPROVAL_HOURS) if expires is None else expires
        if isinstance(uses, bool) or not isinstance(uses, int) or not 1 <= uses <= MAX_USES:
            raise UsageError(f"an approval is used 1 to {MAX_USES:,} times, not {uses!r}")
        if expires.tzinfo is None or expires <= self._time():
            raise UsageError(f"an approval ends at a time with its zone, after now; found {expires.isoformat()}")
        if key.public != self._public:
            raise PolicyError("this key is not the one of this worker's owner: what it signs would not count")
        _printable("the answer", words, MAX_REASON)
        with self._shelf.alone():
            request = self.get(id)
            if request.status != "pending":
                raise PolicyError(f"request {id} was {request.status} already")
            if release and request.kind != "program":
                raise UsageError(f"request {id} asks for a value, which leaves if you approve: that is no program")
            made = Approval(
                id, request.principal, request.role, request.kind, request.data_sets, request.digest, uses,
                expires.astimezone(UTC), request.shown, release,
            ).signed(key)  # fmt: skip
            # First the approval: a crash between the two leaves a request that waits, and can be approved again.
            self._shelf.write(f"approvals/{id}.json", msgspec.json.encode(made))
            self._write(msgspec.structs.replace(request, status="approved", words=words))
        return made

    def deny(self, id: str, reason: str) -> Request:
        """Answer no, or withdraw an approval: what it has left cannot be used. Raises `PolicyError` if it was denied
        already, `UsageError` for a reason that is too long."""
        _printable("the reason", reason, MAX_REASON)
        with self._shelf.alone():
            request = self.get(id)
            if request.status == "denied":
                raise PolicyError(f"request {id} was denied already")
            # First this, whether or not there is an approval: none that turns up for this id counts any more.
            self._shelf.write(f"spent/{id}.json", msgspec.json.encode(_DENIED))
            denied = msgspec.structs.replace(request, status="denied", words=reason)
            self._write(denied)
        return denied

    # -- spending -----------------------------------------------------------------------------------------

    def spend(
        self,
        principal: str,
        role: str,
        kind: Kind,
        digest: str,
        shown: str,
        data_sets: Iterable[str],
        now: datetime | None = None,
    ) -> Approval | None:
        """Use one approval of just this, once; `None` if there is none that is good. `shown` is the SHA-256 of the text
        that its owner must have read, `now` has a zone.

        When it returns, the use is counted, whatever happens next. Of two at once for the last use, one has it."""
        now = self._time() if now is None else now
        sought = (principal, role, kind, tuple(sorted(set(data_sets))), digest, shown)
        with self._shelf.alone():
            for approval in self._approvals():
                if _sought(approval) == sought and now < approval.expires and self._used(approval):
                    return approval
        return None

    def lets_out(
        self,
        ids: Iterable[str],
        principal: str,
        role: str,
        data_sets: Iterable[str],
        now: datetime | None = None,
        behind: Iterable[str] = (),
    ) -> bool:
        """Whether each of these approvals, of programs that ran, lets out what they made of these data sets: it is
        this principal's, signed so, not over and not withdrawn. `behind`: approvals of the runs that made what those
        began with, which need to be good, and no more."""
        now = self._time() if now is None else now
        names, ids = set(data_sets), frozenset(ids)
        wanted = ids.union(behind)
        with self._shelf.alone():
            good = {
                approval.id
                for approval in self._approvals()
                if approval.id in wanted
                and (approval.principal, approval.role, approval.kind) == (principal, role, "program")
                and (approval.id not in ids or (approval.release and names <= set(approval.data_sets)))
                and now < approval.expires
                and 0 <= self._spent(approval) <= approval.uses
            }
        return bool(ids) and good == wanted

    # -- what the ledger is to know -----------------------------------------------------------------------

    def news(self) -> Iterator[tuple[Request, Approval | None]]:
        """The answers that were given, each until `told` of it, with the approval if it is one that is good: an owner
        answers in a process of her own, and the worker that keeps the ledger writes it down when it finds it."""
        stirred = self._shelf.stirred(REQUEST_FOLDER)
        if stirred is not None and stirred == self._looked:
            return
        with self._shelf.alone():
            self._waiting()
            answered = [request for _, request, _ in self._requests.values() if request.status != "pending"]
            approvals = {approval.id: approval for approval in self._approvals()} if answered else {}
        for request in sorted(answered, key=lambda request: (request.when, request.id)):
            if request.id not in self._told:
                self._told[request.id] = self._noted(request.id)
            if self._told[request.id] != request.status:
                yield request, approvals.get(request.id) if request.status == "approved" else None
        if all(self._told[request.id] == request.status for request in answered):
            self._looked = stirred

    def told(self, request: Request) -> None:
        """This answer is in the ledger. If that cannot be kept, it is told once more after a restart."""
        self._told[request.id] = request.status
        try:
            self._shelf.write(f"noted/{request.id}.json", msgspec.json.encode(request.status))
        except OSError as error:
            log.error("that request %s is in the ledger cannot be kept: %s", request.id, error)

    def _noted(self, id: str) -> str:
        try:
            return msgspec.json.decode(self._shelf.read(f"noted/{id}.json"), type=str)
        except (OSError, ValueError):  # then it is told again: a ledger may say too much, never too little
            return ""

    def _approvals(self) -> list[Approval]:
        """Those that the owner signed, the first to end first."""
        known = self._signed
        self._signed = {name: self._again(name, known) for name in self._shelf.names("approvals")}
        found = [approval for _, approval in self._signed.values() if approval is not None]
        return sorted(found, key=lambda approval: (approval.expires, approval.id))

    def _again(self, name: str, known: dict[str, tuple[object, Approval | None]]) -> tuple[object, Approval | None]:
        stamp = self._shelf.stamp(name)
        if name in known and known[name][0] == stamp:
            return known[name]
        return stamp, self._approval(name)

    def _approval(self, name: str) -> Approval | None:
        try:
            text = self._shelf.read(name)
            approval = msgspec.json.decode(text, type=Approval)
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read, and does not count: %s", name, error)
            return None
        # A copy under another name is no second one: uses are counted by the id, which is signed.
        if text == msgspec.json.encode(approval) and approval.genuine(self._public):
            return approval
        log.warning("%s is not what the owner signed, and does not count", name)
        return None

    def _used(self, approval: Approval) -> bool:
        """Count one more use, if one is left."""
        spent = self._spent(approval)
        if not 0 <= spent < approval.uses:
            return False
        self._shelf.write(f"spent/{approval.id}.json", msgspec.json.encode(spent + 1))
        return True

    def _spent(self, approval: Approval) -> int:
        """How often it was used; more than it may be if that cannot be known."""
        name = f"spent/{approval.id}.json"
        try:
            return msgspec.json.decode(self._shelf.read(name), type=int)
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as error:
            log.error("%s cannot be read, so approval %s counts as used up: %s", name, approval.id, error)
            return _DENIED

    # -- within -------------------------------------------------------------------------------------------

    def _waiting(self) -> list[tuple[Request, _Sought]]:
        """Those that nobody has answered, without their programs, which may be large, and many; and what they seek."""
        known, self._requests = self._requests, {}
        for name in self._shelf.names(REQUEST_FOLDER):
            stamp = self._shelf.stamp(name)
            if name in known and known[name][0] == stamp:
                self._requests[name] = known[name]
                continue
            with contextlib.suppress(PolicyError):  # `all` says which is damaged
                found = self.get(name.removeprefix(f"{REQUEST_FOLDER}/").removesuffix(".json"))
                self._requests[name] = stamp, msgspec.structs.replace(found, program=""), _sought(found)
        return [(request, sought) for _, request, sought in self._requests.values() if request.status == "pending"]

    def _write(self, request: Request) -> None:
        self._shelf.write(f"{REQUEST_FOLDER}/{request.id}.json", msgspec.json.encode(request))

    def _free(self) -> str:
        """An id that nothing has: an approval of the past must not be this one's."""
        taken = {*self._shelf.names(REQUEST_FOLDER), *self._shelf.names("approvals"), *self._shelf.names("spent")}
        while True:
            id_ = self._new_id()
            if not any(f"{folder}/{id_}.json" in taken for folder in (REQUEST_FOLDER, "approvals", "spent")):
                return id_

    def _time(self) -> datetime:
        return self._clock().astimezone(UTC)


def _sought(made: Request | Approval) -> _Sought:
    """What must agree between what is approved and what is spent."""
    return made.principal, made.role, made.kind, made.data_sets, made.digest, made.shown


def _check(made: Request) -> None:
    """Refuse what an owner could not read, or what would fill her disk. Raises `UsageError`."""
    if not made.data_sets:
        raise UsageError("there is nobody to ask: what derives from no data set needs no approval")
    if isinstance(made.runs, bool) or not 1 <= made.runs <= MAX_USES:
        raise UsageError(f"a program is to run 1 to {MAX_USES:,} times, not {made.runs!r}")
    if made.kind not in ("value", "program") or not _DIGEST.fullmatch(made.digest):
        raise UsageError(f"{made.kind[:20]!r} {made.digest[:80]!r} is nothing that can be asked for")
    for what, name in (
        ("the principal", made.principal),
        ("the role", made.role),
        *(("a data set", name) for name in made.data_sets),
    ):
        _printable(what, name, 200)
    if not made.reason.strip():
        raise UsageError("a request needs a reason: a sentence for the owner, who decides")
    _printable("the reason", made.reason, MAX_REASON)
    if len(made.program.encode("utf-8", "replace")) > MAX_PROGRAM:
        raise UsageError(f"the program's text is longer than {MAX_PROGRAM:,} bytes: ask for a part of it")
    _printable("the program", made.program, MAX_PROGRAM)


def _printable(what: str, text: str, limit: int) -> None:
    if len(text) > limit:
        raise UsageError(f"{what} has {len(text):,} characters, at most {limit:,}")
    strange = next((mark for mark in text if not mark.isprintable() and mark not in "\n\t"), None)
    if strange is not None:
        raise UsageError(f"{what} has U+{ord(strange):04X}, which cannot be printed: plain text is expected")
