"""`Catalogue`: the data sets that a worker's owner registered, each an `Owned`: name, schema, count, tags.

What must live here: how owned data lies on disk and how it is found. What must not: reading an owner's files
(`readers`), deciding who may use a data set, answering messages.

NOTE [One commit point]
`data/NAME.toml` describes the set and names the file of its elements, `data/NAME.DIGEST.safetensors`, after the
SHA-256 of its content, and that of its mock, `data/NAME.DIGEST.mock.safetensors`. Both are written first, under names
that no description uses yet; renaming the description into place is the one step that makes the set exist, or replaces
it, with its mock. A crash before it leaves the old state whole, and what it left behind is swept away when the same
name is added again. A process that still reads the old elements keeps them: they are mapped, and the system frees a
removed file after its last use.

NOTE [What is signed is signed for this data]
Other data under an old name must not come under the old rules. So before a description is replaced, or removed, the
signature under the policy of that name is taken away: nothing is permitted until its owner has looked and signed again.
Only the same elements with the same unit of privacy, added once more (for another tag, or a mock), keep it. Sessions
that hold values of the old data are told apart by `Lent.identity`.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import logging
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import DataError, UsageError
from ..owner.policies import unsign
from ..types import Label, TensorType, Unit
from .description import Described, Owned, describe, dtype_name, from_text, is_name, plain, record_type, to_text
from .mocks import Fakes, fitted

if sys.platform != "win32":
    import fcntl

__all__ = ["Catalogue", "Lent", "Owned"]

_log = logging.getLogger(__name__)

_IN_NAME = 16  # digits of the digest that stand in a file's name

# safetensors has no such complex numbers: they lie as pairs of reals, along one more dimension.
_PAIRS = {"complex32": "float16", "complex128": "float64"}


Mock = Mapping[str, torch.Tensor] | Fakes | None


class Lent(NamedTuple):
    """A data set as a session gets it. `identity` is another one for other data under the same name."""

    columns: dict[str, torch.Tensor]
    label: Label
    identity: str


class _Entry(NamedTuple):
    """What is known of a name: its data set and where the elements are, or why it cannot be used."""

    stat: tuple[int, int, int] | None  # of the description; None for a set in memory
    owned: Owned | None
    digest: str
    mock: str  # digest of its mock's file
    damage: str
    identity: str


def _now() -> datetime:
    return datetime.now(UTC)


class Catalogue:
    """The data sets of one worker: those in `folder`/data, and those registered in memory.

    Another process may add and remove sets in the folder at any time: every answer looks at the folder first.
    Safe to use from several threads. `clock` gives the time at which a set was added.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, clock: Callable[[], datetime] = _now) -> None:
        self.folder = None if folder is None else Path(folder) / "data"
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._loaded: dict[str, tuple[str, dict[str, torch.Tensor]]] = {}  # name -> digest, columns
        self._mocks: dict[str, tuple[str, dict[str, torch.Tensor]]] = {}  # likewise
        self._contents: dict[str, str] = {}  # of sets in memory: identity -> SHA-256 of what they hold
        self._registered = 0  # how many sets ever were, in memory
        self._lock = threading.RLock()

    # -- finding ------------------------------------------------------------------------------------------

    def names(self) -> tuple[str, ...]:
        """The names of the sets that can be used, sorted."""
        return tuple(owned.name for owned in self.search())

    def search(self, *tags: str) -> tuple[Owned, ...]:
        """The sets that carry all of these tags, by name."""
        with self._lock:
            self._scan()
            known = [entry.owned for _, entry in sorted(self._entries.items()) if entry.owned is not None]
        return tuple(owned for owned in known if set(tags) <= set(owned.tags))

    def damaged(self) -> dict[str, str]:
        """Names whose description cannot be read, and why: for the owner, not for those who search."""
        with self._lock:
            self._scan()
            return {name: entry.damage for name, entry in sorted(self._entries.items()) if entry.owned is None}

    def owned(self, name: str) -> Owned:
        """The data set of this name. `DataError` lists names that are close to one that is unknown."""
        return self._known(name)[0]

    def columns(self, name: str) -> dict[str, torch.Tensor]:
        """The columns of a data set, without those that are withheld: loaded once and mapped, so that they need not fit
        into memory.

        The tensors are shared by all callers: copy before writing. `DataError` if the name is unknown, or the file
        is gone or is not what its description says."""
        return self.lent(name).columns

    def lent(self, name: str) -> Lent:
        """`columns`, with the label of what is computed from them. Raises as it does."""
        with self._lock:
            owned, columns, identity = self._found(name, self._columns, "elements")
        return Lent({column: columns[column] for column in owned.columns}, owned.label, identity)

    def whole(self, name: str) -> Lent:
        """`lent`, with what is withheld: for the owner's own code alone. Raises as `columns` does."""
        with self._lock:
            owned, columns, identity = self._found(name, self._columns, "elements")
        return Lent({column: columns[column] for column in (*owned.columns, *owned.withheld)}, owned.label, identity)

    def content(self, name: str) -> str:
        """What the elements under this name are called, whatever the name: the same for the same elements, protected
        alike. For a set in memory they are gone over once. Raises as `columns` does."""
        with self._lock:
            entry = self._known(name)[1]
            if entry.stat is not None:
                return entry.identity
            owned, columns, identity = self._found(name, self._columns, "elements")
            if identity not in self._contents:
                self._contents[identity] = _content(owned, columns)
            return self._contents[identity]

    def persons(self, name: str) -> torch.Tensor:
        """Whose record each is, a number for each person: for the owner's own code. Raises as `columns` does, and
        `UsageError` where the unit of privacy is a record."""
        with self._lock:
            owned, columns, _ = self._found(name, self._columns, "elements")
        if not owned.withheld:
            raise UsageError(f"data set '{name}' protects records: it does not say whose they are")
        return columns[next(iter(owned.withheld))]

    def mock(self, name: str) -> dict[str, torch.Tensor]:
        """The columns of a data set's mock, for whoever asks: never the data's. `DataError` if it has none, or its file
        is not the one that was added."""
        with self._lock:
            return dict(self._found(name, self._mock, "mock")[1])

    def identity(self, name: str) -> str:
        """What tells the data under this name from other data that had the name before, or will; empty without any."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is None or (entry.stat is not None and entry.stat != self._stamp(name)):
                self._scan()
                entry = self._entries.get(name)
        return "" if entry is None else entry.identity

    def check(self, name: str) -> None:
        """Read the file of a data set through, and compare its SHA-256. `DataError` if it is not what was added."""
        owned, entry = self._known(name)
        if entry.stat is None:
            return
        path = self._data(name, entry.digest)
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != entry.digest:
                raise DataError(
                    f"data set '{name}' is damaged: {path.name} has SHA-256 {found}, {entry.digest} was added; "
                    "add it again with --replace"
                )
            _load(path, owned)
            if owned.mock:
                _load_mock(self._data(name, entry.mock, ".mock"), owned, entry.mock)
        except OSError as error:
            raise DataError(f"data set '{name}' cannot be read: {error}") from None

    # -- changing -----------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        columns: Mapping[str, torch.Tensor],
        tags: Iterable[str] = (),
        description: str = "",
        *,
        classes: Mapping[str, tuple[str, ...]] | None = None,
        sources: Mapping[str, tuple[str, ...]] | None = None,
        mock: Mock = None,
        unit: Unit = "record",
        person: str = "",
        replace: bool = False,
    ) -> Owned:
        """Store a data set in the folder: it is there whole once this returns, or not at all, and its mock with it.

        `columns` hold one record a row, all equally many. `person` names the one that says whose record each is, where
        `unit` is "person"; it is withheld. `UsageError` for a name, tag, column or mock that is unfit, and for a name
        that is taken unless `replace`; `DataError` if the disk fails. See NOTE [What is signed is signed for this
        data]."""
        if self.folder is None:
            raise UsageError("this catalogue has no folder: use register, which keeps a data set in memory")
        values = {column: plain(column, tensor) for column, tensor in columns.items()}
        owned = describe(name, values, tags, description, classes, sources, self._clock(), unit=unit, person=person)
        mocks = fitted(name, owned.columns, values, mock)
        owned = _with_mock(owned, mocks)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._lock, _alone(self.folder):
                self._check_free(name, replace)
                if self._entries.get(name, _FREE).owned and self._entries[name].stat is None:
                    raise UsageError(f"data set '{name}' is registered in memory: remove it there first")
                self._store(owned, _storable(values), _storable(mocks))
                self._scan()
        except (OSError, SafetensorError, UnicodeEncodeError) as error:
            raise DataError(f"data set '{name}' was not stored: {error}") from None
        return owned

    def register(
        self,
        name: str,
        columns: Mapping[str, torch.Tensor],
        tags: Iterable[str] = (),
        description: str = "",
        *,
        classes: Mapping[str, tuple[str, ...]] | None = None,
        sources: Mapping[str, tuple[str, ...]] | None = None,
        mock: Mock = None,
        unit: Unit = "record",
        person: str = "",
        replace: bool = False,
    ) -> Owned:
        """Keep a data set in memory, for as long as this catalogue lives: the tensors themselves, not copies, but for
        the mock's. Raises as `add` does."""
        values = {column: plain(column, tensor) for column, tensor in columns.items()}
        owned = describe(name, values, tags, description, classes, sources, self._clock(), unit=unit, person=person)
        mocks = fitted(name, owned.columns, values, mock)
        owned = _with_mock(owned, mocks)
        with self._lock:
            self._check_free(name, replace)
            if self.folder is not None and self._entries.get(name, _FREE).stat is not None:
                raise UsageError(f"data set '{name}' lies on disk: remove it there first")
            self._registered += 1
            self._entries[name] = _Entry(None, owned, "", "", "", f"registered {self._registered}")
            self._loaded[name] = ("", values)
            self._mocks[name] = ("", mocks)
        return owned

    def remove(self, name: str) -> None:
        """Remove a data set, a damaged one too. `DataError` if there is none of this name."""
        with self._lock:
            self._scan()
            entry = self._entries.get(name)
            if entry is None:
                raise self._unknown(name)
            if entry.stat is None or self.folder is None:
                self._forget(name)
                return
            try:
                with _alone(self.folder):
                    unsign(self.folder.parent, name)
                    (self.folder / f"{name}.toml").unlink(missing_ok=True)
                    _sync(self.folder)
                    self._sweep(name, keep=None)
                self._scan()
            except OSError as error:
                raise DataError(f"data set '{name}' was not removed: {error}") from None

    # -- the folder ---------------------------------------------------------------------------------------

    def _scan(self) -> None:
        """Take in what changed in the folder since the last look. Costs a `stat` for each data set."""
        if self.folder is None:
            return
        found: dict[str, os.DirEntry[str]] = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            found = {
                entry.name.removesuffix(".toml"): entry
                for entry in entries
                if entry.name.endswith(".toml") and is_name(entry.name.removesuffix(".toml"))
            }
        for name in [name for name, entry in self._entries.items() if entry.stat is not None and name not in found]:
            self._forget(name)
        for name, file in found.items():
            try:
                stamp = _stamp(file.stat())
            except FileNotFoundError:
                self._forget(name)
                continue
            known = self._entries.get(name)
            if known is None or known.stat not in (None, stamp):  # what this process registered itself goes first
                self._forget(name)
                self._entries[name] = _entry(name, Path(file.path), stamp)

    def _stamp(self, name: str) -> tuple[int, int, int] | None:
        """Of the description of a set that is known to lie in the folder; None if it does not any more."""
        assert self.folder is not None  # else it is in memory
        try:
            return _stamp((self.folder / f"{name}.toml").stat())
        except FileNotFoundError:
            return None

    def _forget(self, name: str) -> None:
        self._entries.pop(name, None)
        self._loaded.pop(name, None)
        self._mocks.pop(name, None)

    def _known(self, name: str) -> tuple[Owned, _Entry]:
        with self._lock:
            self._scan()
            entry = self._entries.get(name)
            if entry is None:
                raise self._unknown(name)
        if entry.owned is None:
            raise DataError(f"data set '{name}' cannot be used: its description is damaged")
        return entry.owned, entry

    def _unknown(self, name: str) -> DataError:
        close = difflib.get_close_matches(name[:64], [owned.name for owned in self.search()], n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        return DataError(f"there is no data set '{name[:64]}'{hint}")

    def _found(self, name: str, look: _Look, what: str) -> _Found:
        """What `look` finds. `DataError` if its file is gone."""
        try:
            return look(name)
        except FileNotFoundError:  # replaced or removed since the folder was scanned: look once more
            try:
                return look(name)
            except FileNotFoundError:
                raise DataError(f"data set '{name}' has lost its {what}: add it again with --replace") from None

    def _columns(self, name: str) -> _Found:
        owned, entry = self._known(name)
        digest, columns = self._loaded.get(name, ("", {}))
        if entry.stat is not None and digest != entry.digest:
            columns = _load(self._data(name, entry.digest), owned)
            self._loaded[name] = (entry.digest, columns)
        return _Found(owned, columns, entry.identity)

    def _mock(self, name: str) -> _Found:
        owned, entry = self._known(name)
        if not owned.mock:
            raise DataError(f"data set '{name}' has no mock")
        digest, columns = self._mocks.get(name, ("", {}))
        if entry.stat is not None and digest != entry.mock:
            columns = _load_mock(self._data(name, entry.mock, ".mock"), owned, entry.mock)
            self._mocks[name] = (entry.mock, columns)
        return _Found(owned, columns, entry.identity)

    def _data(self, name: str, digest: str, kind: str = "") -> Path:
        assert self.folder is not None  # only sets on disk have a digest
        return self.folder / f"{name}.{digest[:_IN_NAME]}{kind}.safetensors"

    def _check_free(self, name: str, replace: bool) -> None:
        self._scan()
        entry = self._entries.get(name)
        if entry is not None and not replace:
            raise UsageError(f"there is a data set '{name}' already: choose another name, or replace it")

    def _store(self, owned: Owned, columns: dict[str, torch.Tensor], mock: dict[str, torch.Tensor]) -> None:
        """Elements first, then the description: see NOTE [One commit point]."""
        assert self.folder is not None  # `add` has checked
        name = owned.name
        with contextlib.ExitStack() as stack:
            elements, fakes, text = (stack.enter_context(_temporary(self.folder, name)) for _ in range(3))
            digest, mocked = _saved(columns, elements), _saved(mock, fakes) if mock else ""
            text.write_text(to_text(owned, digest, mocked), encoding="utf-8")
            _sync(text)
            os.replace(elements, self._data(name, digest))
            if mock:
                os.replace(fakes, self._data(name, mocked, ".mock"))
            _sync(self.folder)
            if _identity(Described(owned, digest)) != self._entries.get(name, _FREE).identity:
                unsign(self.folder.parent, name)
            try:
                os.replace(text, self.folder / f"{name}.toml")
            except BaseException:
                self._scan()  # the folder says which elements are in use now, whatever was interrupted
                entry = self._entries.get(name)
                if entry is None or entry.digest:  # those of a damaged description may still be wanted
                    self._sweep(name, keep=entry)
                raise
            _sync(self.folder)
            self._sweep(name, keep=_FREE._replace(digest=digest, mock=mocked))

    def _sweep(self, name: str, keep: _Entry | None) -> None:
        """Remove what belongs to a name and is not in use: older elements, mocks, and what a crash left."""
        assert self.folder is not None  # as above
        kept = keep and (self._data(name, keep.digest).name, self._data(name, keep.mock, ".mock").name)
        elements = re.compile(rf"{re.escape(name)}\.[0-9a-f]{{{_IN_NAME}}}(\.mock)?\.safetensors")
        for path in list(self.folder.iterdir()):
            if path.name not in (kept or ()) and (
                elements.fullmatch(path.name) or path.name.startswith(f".{name}.adding-")
            ):
                with contextlib.suppress(PermissionError):  # Windows keeps what is mapped; the next sweep has it
                    path.unlink(missing_ok=True)


_FREE = _Entry(None, None, "", "", "", "")


class _Found(NamedTuple):
    """Columns that are loaded, and of what."""

    owned: Owned
    columns: dict[str, torch.Tensor]
    identity: str


_Look = Callable[[str], _Found]


def _identity(described: Described) -> str:
    """Of data on disk: another one for other elements, or another unit of privacy."""
    withheld = next(iter(described.owned.withheld), "")
    return hashlib.sha256(f"{described.digest} {withheld}".encode()).hexdigest()


def _content(owned: Owned, columns: Mapping[str, torch.Tensor]) -> str:
    """Of data in memory, as `_identity` of data on disk."""
    found = hashlib.sha256(repr(sorted(owned.withheld)).encode())
    for name, column in sorted(columns.items()):
        found.update(f"{name!r} {dtype_name(column)} {tuple(column.shape)}".encode())
        found.update(column.cpu().contiguous().unsqueeze(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_mtime_ns, status.st_size, status.st_ino


def _with_mock(owned: Owned, mock: dict[str, torch.Tensor]) -> Owned:
    return msgspec.structs.replace(owned, mock=len(next(iter(mock.values())))) if mock else owned


def _saved(columns: dict[str, torch.Tensor], path: Path) -> str:
    """Write elements to the disk; the SHA-256 of their file."""
    save_file(columns, path)
    _sync(path)
    return _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _storable(columns: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The columns as safetensors takes them: at home, contiguous, no two in one piece of memory."""
    stored: dict[str, torch.Tensor] = {}
    met: set[int] = set()
    for name, tensor in columns.items():
        tensor = tensor.cpu().contiguous()
        if dtype_name(tensor) in _PAIRS:
            tensor = torch.view_as_real(tensor)
        storage = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.clone() if storage in met else tensor
        met.add(storage)
    return stored


def _load(path: Path, owned: Owned) -> dict[str, torch.Tensor]:
    """The mapped columns of a file, which must be those that the description promises, withheld ones too."""
    return _mapped(path, owned.name, owned.columns | owned.withheld, owned.count)


def _load_mock(path: Path, owned: Owned, digest: str) -> dict[str, torch.Tensor]:
    """The columns of a mock, in memory. It is given to anybody, so its file must be the one that was added."""
    if _digest(path) != digest:
        raise DataError(f"the mock of data set '{owned.name}' is damaged: {path.name} is not the file that was added")
    columns = _mapped(path, owned.name, owned.columns, owned.mock)
    return {name: column.clone() for name, column in columns.items()}


def _mapped(path: Path, name: str, types: Mapping[str, TensorType], count: int) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != set(types):
                raise DataError(f"data set '{name}' is damaged: {path.name} has other columns than described")
            columns = {column: _unpaired(file.get_tensor(column), types[column]) for column in types}
    except SafetensorError as error:
        raise DataError(f"data set '{name}' is damaged: {path.name}: {error}") from None
    for column, tensor in columns.items():
        if len(tensor) != count or record_type(tensor) != types[column]:
            raise DataError(f"data set '{name}' is damaged: column '{column}' is not of the type described")
    return columns


def _unpaired(tensor: torch.Tensor, promised: TensorType) -> torch.Tensor:
    pairs = _PAIRS.get(promised.dtype) == dtype_name(tensor) and tensor.dim() > 1 and tensor.shape[-1] == 2
    return torch.view_as_complex(tensor) if pairs else tensor


def _entry(name: str, path: Path, stamp: tuple[int, int, int]) -> _Entry:
    """What a description says; one that cannot be read makes this set unusable, not the others."""
    try:
        described = from_text(name, path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        _log.warning("data set '%s' cannot be used: %s: %s", name, path.name, error)
        return _Entry(stamp, None, "", "", f"{path.name}: {error}", "")
    return _Entry(stamp, *described, "", _identity(described))


# -- the disk -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: two processes that add at once would not see each other's names."""
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # and the lock with it


@contextlib.contextmanager
def _temporary(folder: Path, name: str) -> Iterator[Path]:
    """An empty file that only this user may read, gone afterwards unless it was renamed."""
    handle, path = tempfile.mkstemp(prefix=f".{name}.adding-", dir=folder)
    os.close(handle)
    try:
        yield Path(path)
    finally:
        Path(path).unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if sys.platform == "win32" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
