"""`Policies`: which policy holds for each data set of a worker, and how an owner signs one.

What must live here: the files of policies, their signatures and their versions. What must not: what a policy permits.

NOTE [What counts]
`policies/NAME.toml` is what the owner writes. `policies/NAME.signed` is what she signed: the same bytes, then one line
with the signature of purpose, name and bytes. The policy holds while both agree, the signature is the owner's key's,
and no later version was seen. In every other case, a file half edited too, nothing is permitted, and the owner's log
says why. The name is signed with it, so one data set's policy is no policy for another.

NOTE [Downgrade]
An old file that the owner did sign, put back, would open what she has closed. So versions only grow: `Seen` keeps the
last one of each data set, and its digest, since two texts could bear one number. Whoever can write the worker's folder
can delete that too; the ledger has every change, and its heads are known outside.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from ..errors import PolicyError
from .files import locked, make_folder, read, replace
from .policy import DENY, Policy
from .signing import SIGNATURE_BYTES, OwnerKey, verify

__all__ = ["POLICY_FOLDER", "Draft", "Policies", "Seen", "Turn", "draft", "policy_names", "sign", "standing", "unsign"]

log = logging.getLogger(__name__)

POLICY_FOLDER = "policies"
_PURPOSE = b"housecall policy 1\0"
_MAX_BYTES = 256 << 10
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)  # a data set's, as in `owned`, which needs torch
_MARK = b"# signature = "
_TRAILER = len(_MARK) + 2 * SIGNATURE_BYTES + 1
_VERSION = re.compile(rb"^version[ \t]*=[ \t]*[0-9_]+", re.MULTILINE)

Stamp = tuple[int, int, int] | None  # of a file: when it was written, its size, which file; None without one


_NEVER: tuple[Stamp, Stamp] = ((0, 0, 0), (0, 0, 0))  # of no file: what is known so is looked for again


class _Last(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last version of a policy that was seen, and the SHA-256 of its text."""

    version: int
    digest: str


class Seen:
    """The last version of each policy that this worker took: in `folder`/policies/seen.json, or in memory."""

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._folder = None if folder is None else Path(folder) / POLICY_FOLDER
        self._memory: dict[str, _Last] = {}
        self._lock = threading.Lock()

    def last(self, name: str) -> int:
        """The highest version seen; 0: none. Raises `PolicyError` if that cannot be known."""
        last = self._read().get(name)
        return last.version if last else 0

    def check(self, name: str, version: int, text: bytes) -> bool:
        """Whether this is later than the last. Raises `PolicyError` for an older one, or another one of its number."""
        last = self._read().get(name)
        if last is None or version > last.version:
            return True
        if version < last.version:
            raise PolicyError(f"version {version} is older than {last.version}, which was in force already")
        if _digest(text) != last.digest:
            raise PolicyError(f"there was another version {version} already: a change needs a greater number")
        return False

    def note(self, name: str, version: int, text: bytes) -> None:
        """Take no older one from now on. Raises as `check` does, and leaves what is kept as it was."""
        with self._alone():
            if self.check(name, version, text):
                known = {**self._read(), name: _Last(version, _digest(text))}
                if self._folder is None:
                    self._memory = known
                else:
                    replace(self._folder / "seen.json", msgspec.json.encode(known, order="sorted"))

    def _read(self) -> dict[str, _Last]:
        if self._folder is None:
            return self._memory
        try:
            return msgspec.json.decode(read(self._folder / "seen.json", 16 << 20), type=dict[str, _Last])
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise PolicyError(f"{self._folder / 'seen.json'} cannot be read: {error}") from None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with self._lock:
            if self._folder is None:
                yield
                return
            make_folder(self._folder)
            with locked(self._folder / ".lock"):
                yield


class _Known(NamedTuple):
    """What was found for a name: the files as they were, the policy, and why it does not count; and which one was the
    last that did, in this process: what comes into force after it is compared with that."""

    stamps: tuple[Stamp, Stamp]
    policy: Policy
    why: str
    last: Policy | None = None


class Turn(NamedTuple):
    """A change of what holds for a data set. `old` is `None` where an earlier version was in force that this process
    never saw; `digest` is the SHA-256 of the new policy's text; `why`, if nothing is permitted from now on."""

    name: str
    old: Policy | None
    new: Policy
    digest: str = ""
    why: str = ""


class Policies(Mapping[str, Policy]):
    """The policies in force, by the name of their data set. One that does not count is `DENY`; see NOTE [What counts].

    Those registered in memory need no signature: whoever runs this process is the owner. The others lie in `folder`,
    signed by the key whose public half is `public`; they are looked at again whenever they are asked for, at the cost
    of two `stat`. `changed` is told of a version before it takes effect; if it raises, none does. It is also told of
    one that no longer counts. Safe to use from several threads."""

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        public: bytes = b"",
        *,
        seen: Seen | None = None,
        changed: Callable[[Turn], None] = lambda turn: None,
    ) -> None:
        self._folder = None if folder is None else Path(folder) / POLICY_FOLDER
        self._public = public
        self._seen = Seen(folder) if seen is None else seen
        self._changed = changed
        self._registered: dict[str, Policy] = {}
        self._known: dict[str, _Known] = {}
        self._lock = threading.RLock()

    def register(self, name: str, policy: Policy) -> None:
        """Have a policy hold for a data set of this process, whatever the folder says. Raises what `changed` does."""
        if not isinstance(policy, Policy):
            raise PolicyError(f"the policy of '{name}' is a {type(policy).__name__}, expected a housecall.Policy")
        with self._lock:
            old = self._registered.get(name, DENY)
            if policy != old:
                self._changed(Turn(name, old, policy, _digest(policy.text().encode())))
            self._registered[name] = policy

    def forget(self, name: str, why: str = "") -> None:
        """Remove what was registered. `changed` is told of it where there is a reason: else another follows."""
        with self._lock:
            old = self._registered.pop(name, DENY)
            if why and old != DENY:
                self._lost(name, old, why)

    def why(self, name: str) -> str:
        """Why nothing is permitted, for the owner; empty if the data set's policy holds."""
        with self._lock:
            return "" if name in self._registered else self._look(name).why

    def __getitem__(self, name: str) -> Policy:
        """The policy in force. Raises `KeyError` for a name that has none; one that does not count is `DENY`."""
        with self._lock:
            found = self._registered.get(name)
            if found is not None:
                return found
            known = self._look(name)
            if known.stamps == (None, None):
                raise KeyError(name)
            return known.policy

    def __iter__(self) -> Iterator[str]:
        """The names that have a policy, whether or not it counts, sorted."""
        return iter(sorted({*self._registered, *(_names(self._folder) if self._folder else ())}))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _look(self, name: str) -> _Known:
        """What the folder says of a name, read again if its files changed."""
        if self._folder is None or not _NAME.fullmatch(name):
            return _Known((None, None), DENY, "there is no policy")
        stamps = _stamp(self._folder / f"{name}.toml"), _stamp(self._folder / f"{name}.signed")
        known = self._known.get(name)
        if known is None or known.stamps != stamps:
            before, known = known, self._load(name, stamps, known)
            self._known[name] = known
            if known.why:
                log.warning("data set '%s': nothing is permitted: %s", name, known.why)
                if before is not None and not before.why:
                    self._lost(name, before.policy, known.why)
        return known

    def _lost(self, name: str, old: Policy, why: str) -> None:
        """A policy that was in force is deleted, or no longer counts."""
        try:
            self._changed(Turn(name, old, DENY, why=why))
        except Exception as error:  # nothing is permitted in any case
            log.error("data set '%s': that its policy does not count could not be written down: %s", name, error)

    def _load(self, name: str, stamps: tuple[Stamp, Stamp], before: _Known | None) -> _Known:
        assert self._folder is not None  # `_look` has checked
        old = before.last if before is not None else None
        try:
            policy, text = _signed(self._folder, name, self._public)
            later = self._seen.check(name, policy.version, text)
            if old is None and not self._seen.last(name):
                old = DENY
        except PolicyError as error:
            return _Known(stamps, DENY, str(error), old)
        try:
            if later or (before is not None and before.why):  # new, or in force again
                self._changed(Turn(name, old, policy, _digest(text)))
                self._seen.note(name, policy.version, text)
        except Exception as error:  # whatever it is, nothing is permitted; another time it may succeed
            return _Known(_NEVER, DENY, f"its change could not be written down: {error}", old)
        return _Known(stamps, policy, "", policy)


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _message(name: str, text: bytes) -> bytes:
    return _PURPOSE + name.encode() + b"\0" + text


def _bytes(path: Path, what: str) -> bytes:
    try:
        return read(path, _MAX_BYTES)
    except FileNotFoundError:
        raise PolicyError(what) from None
    except (OSError, ValueError) as error:
        raise PolicyError(f"{path} cannot be read: {error}") from None


def _parsed(text: bytes, source: str) -> Policy:
    try:
        return Policy.parse(text.decode(), source)
    except UnicodeDecodeError as error:
        raise PolicyError(f"{source}: not UTF-8: {error}") from None


def _signed(folder: Path, name: str, public: bytes) -> tuple[Policy, bytes]:
    """The policy in force and its text. Raises `PolicyError` that says why none is."""
    text = _bytes(folder / f"{name}.toml", "there is no policy")
    policy, agreed = _last_signed(folder, name, public)
    if text != agreed:
        raise PolicyError(f"{name}.toml was changed since it was signed: `housecall worker policy sign {name}`")
    return policy, text


def _last_signed(folder: Path, name: str, public: bytes) -> tuple[Policy, bytes]:
    """What the owner signed last, and its text, whatever became of the file beside it. Raises `PolicyError`."""
    path = folder / f"{name}.signed"
    both = _bytes(path, f"the policy is not signed: `housecall worker policy sign {name}`")
    text, trailer = both[:-_TRAILER], both[-_TRAILER:]
    line = re.fullmatch(re.escape(_MARK) + rb"([0-9a-f]{%d})\n" % (2 * SIGNATURE_BYTES), trailer)
    if not line or not verify(public, _message(name, text), bytes.fromhex(line[1].decode())):
        raise PolicyError(f"{path.name} does not bear the signature of this worker's owner")
    return _parsed(text, path.name), text


def _names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.toml") if _NAME.fullmatch(path.stem))


# -- the owner's side -----------------------------------------------------------------------------------------


def policy_names(folder: str | os.PathLike[str]) -> list[str]:
    """The data sets for which a policy is written, whether or not it counts."""
    return _names(Path(folder) / POLICY_FOLDER)


def standing(folder: str | os.PathLike[str], name: str, public: bytes) -> tuple[Policy, str]:
    """The policy that a worker in this folder would go by, and why it is `DENY` if none counts; only looks."""
    try:
        _named(name)
        policy, text = _signed(Path(folder) / POLICY_FOLDER, name, public)
        Seen(folder).check(name, policy.version, text)
    except PolicyError as error:
        return DENY, str(error)
    return policy, ""


def _named(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise PolicyError(f"{name[:80]!r} is no name of a data set")


class Draft(NamedTuple):
    """What an owner is about to sign: `text` as it will be, its policy, and `old`, the one she signed last."""

    name: str
    text: bytes
    policy: Policy
    old: Policy
    signed: bool  # it is in force as it stands


def draft(folder: str | os.PathLike[str], name: str, public: bytes, *, seen: Seen | None = None) -> Draft:
    """Read `policies/NAME.toml` for signing. Its version is raised above the last one if it is not already.

    Raises `PolicyError` if it is missing or malformed. One that was signed by another key counts as not signed."""
    _named(name)
    seen = Seen(folder) if seen is None else seen
    place = Path(folder) / POLICY_FOLDER
    missing = f"no {POLICY_FOLDER}/{name}.toml: `housecall worker policy show {name}` prints one to begin with"
    text = _bytes(place / f"{name}.toml", missing)
    policy = _parsed(text, f"{name}.toml")
    try:
        old, before = _last_signed(place, name, public)
    except PolicyError:
        old, before = DENY, b""
    last = max(seen.last(name), old.version if before else 0)
    if text == before and policy.version >= last:
        return Draft(name, text, policy, old, signed=True)
    if policy.version <= last:
        text = _numbered(text, last + 1, policy)
    return Draft(name, text, _parsed(text, name), old, signed=False)


def _numbered(text: bytes, version: int, policy: Policy) -> bytes:
    """The same text with another version. Raises `PolicyError` if it cannot be put there without touching more."""
    line = b"version = %d" % version
    raised = _VERSION.sub(line, text, count=1) if _VERSION.search(text) else line + b"\n" + text
    with contextlib.suppress(PolicyError):
        if _parsed(raised, "policy") == msgspec.structs.replace(policy, version=version):
            return raised
    raise PolicyError(f"the version must be {version} or more, above the last one: write `version = {version}`")


def sign(folder: str | os.PathLike[str], made: Draft, key: OwnerKey, *, seen: Seen | None = None) -> None:
    """Put a draft in force. Raises `PolicyError` if the owner has signed, or edited, another one meanwhile.

    A crash between its two files leaves the policy unsigned: nothing is permitted until it is signed again."""
    seen = Seen(folder) if seen is None else seen
    place = Path(folder) / POLICY_FOLDER
    make_folder(place)
    with locked(place / ".sign.lock"):
        if draft(folder, made.name, key.public, seen=seen) != made:
            raise PolicyError(f"the policy of '{made.name}' changed meanwhile: look at it again")
        signature = key.sign(_message(made.name, made.text))
        replace(place / f"{made.name}.toml", made.text)
        replace(place / f"{made.name}.signed", made.text + _MARK + signature.hex().encode() + b"\n")


def unsign(folder: str | os.PathLike[str], name: str) -> None:
    """Take the signature under a policy away, since what it was signed for is gone: nothing is permitted until the
    owner signs again, a later version, so that the old file put back counts for nothing. What she wrote stays."""
    path = Path(folder) / POLICY_FOLDER / f"{name}.signed"
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return
    seen = Seen(folder)
    with contextlib.suppress(PolicyError):  # a damaged one counts for nothing anyway
        seen.note(name, max(seen.last(name), _parsed(text, path.name).version) + 1, b"")
    path.unlink(missing_ok=True)
