"""What `housecall worker add|list|remove|check` do and show. Only those commands import it, since it imports torch.

What is printed here is the owner's own terminal: the least and the greatest value of a column may stand there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from ..errors import DataError, UsageError
from ..owned.catalogue import Catalogue, Owned
from ..owned.description import unit_trouble
from ..owned.mocks import Fakes, Range
from ..owned.readers.files import read
from ..owned.readers.records import Records, Request
from ..owner.policies import POLICY_FOLDER, standing
from ..owner.signing import PUBLIC_FILE, public_key
from .worker import in_folder

__all__ = ["Addition", "Mock", "discard", "show", "store", "verify"]

_STEP_BYTES = 64 << 20  # of a column are looked at together, so that a mapped file is not copied whole
_CLASSES = 20
_BAR_FROM = 200  # fewer items are done before a bar is seen


@dataclass(frozen=True)
class Mock:
    """What the options say: the `files` that it is read from, or how it is made up. Neither: there is none."""

    files: tuple[Path, ...] = ()
    fakes: Fakes | None = None

    @classmethod
    def of(cls, words: Sequence[str], records: int | None, ranges: Mapping[str, Range]) -> Mock:
        """What `--mock`, `--mock-records` and `--range` say together. `UsageError` if they contradict each other."""
        if list(words) == ["generated"]:
            return cls((), Fakes(100 if records is None else records, ranges))
        if "generated" in words:
            raise UsageError("--mock generated stands alone; for a file of this name write --mock ./generated")
        if ranges or records is not None:
            raise UsageError("--range and --mock-records say how a mock is made up: pass --mock generated with them")
        return cls(tuple(map(Path, words)))


@dataclass(frozen=True)
class Addition:
    """What the options of `housecall worker add` say."""

    name: str
    files: Sequence[Path]
    tags: tuple[str, ...]
    description: str
    columns: Mapping[str, tuple[str, ...]]
    labels: tuple[str, ...]
    missing: Literal["refuse", "nan"]
    size: tuple[int, int] | None
    dtypes: Mapping[str, str]
    mock: Mock
    person: str
    replace: bool


def store(folder: Path, addition: Addition, *, ask: bool) -> bool:
    """Read, show, ask, store. Whether it was stored."""
    console = Console()
    catalogue = Catalogue(folder)
    request = Request(
        addition.columns, addition.labels, addition.missing, addition.size, addition.dtypes, _progress(console)
    )
    records = read(addition.files, request)
    options: dict[str, Any] = {
        "tags": addition.tags,
        "description": addition.description,
        "classes": records.classes,
        "sources": records.sources,
        "mock": _mock(addition, request, records),
        "unit": "person" if addition.person else "record",
        "person": addition.person,
        "replace": addition.replace,
    }
    planned = Catalogue().register(addition.name, records.columns, **options)  # what is unfit is refused before asking
    if not addition.replace and addition.name in (*catalogue.names(), *catalogue.damaged()):
        raise DataError(f"there is a data set '{addition.name}' already: choose another name, or pass --replace")
    _preview(console, planned, records, options["mock"])
    if ask and not _agreed(f"Store it in {folder}?"):
        console.print("Nothing was stored.")
        return False
    catalogue.add(addition.name, records.columns, **options)
    console.print(f"Data set '{escape(addition.name)}' is stored: {planned.count:,} records.", highlight=False)
    _say_unsigned(folder, addition.name)
    return True


def _mock(addition: Addition, request: Request, records: Records) -> Any:
    """The mock that was asked for, as `Catalogue.add` takes it: files are read as the data was, and words get the
    numbers that they have there."""
    if not addition.mock.files:
        return addition.mock.fakes
    person = addition.person
    theirs = request.columns.get(person, (person,))
    request = replace(
        request,
        columns={name: sources for name, sources in request.columns.items() if name != person},
        labels=tuple(name for name in request.labels if name not in theirs),
        dtypes={name: dtype for name, dtype in request.dtypes.items() if name != person},
    )
    mock = read(addition.mock.files, request)
    mock.columns.pop(person, None)
    for name, values in mock.classes.items():
        if name != person:
            _renumber(mock, name, values, records.classes.get(name, ()))
    return mock.columns


def _renumber(mock: Records, name: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Give the classes of a mock's column the numbers that they have in the data."""
    unknown = [value for value in values if value not in known]
    if unknown:
        raise UsageError(
            f"column '{name}' of the mock has {', '.join(unknown[:3])}, which the data has not: its values are "
            f"{_numbered(known)}"
        )
    target, _, source = name.partition(".") if name not in mock.columns else (name, "", "")
    column = mock.columns[target]
    part = column[:, mock.sources[target].index(source)] if source else column
    part.copy_(torch.tensor([known.index(value) for value in values])[part.long()])


def _unsigned(folder: Path, name: str) -> bool:
    """Whether a policy is written and not signed."""
    policies = folder / POLICY_FOLDER
    return (policies / f"{name}.toml").is_file() and not (policies / f"{name}.signed").is_file()


def _say_unsigned(folder: Path, name: str) -> None:
    """After a change of data: it needs a policy, and one that was signed for other data counts no more."""
    place = in_folder(folder)
    if not (folder / POLICY_FOLDER / f"{name}.toml").is_file():
        typer.secho(
            f"Nobody may use '{name}' yet: it has no policy. To begin with one: housecall worker policy show {name}"
            f"{place}",
            fg="yellow",
        )
    elif _unsigned(folder, name):
        typer.secho(
            f"Nothing is permitted on '{name}': its policy is not signed for this data. Look at it, then: housecall "
            f"worker policy sign {name}{place}",
            fg="yellow",
        )


def show(folder: Path) -> None:
    """All data sets, by name, without a value."""
    console = Console()
    catalogue = Catalogue(folder)
    table = Table("data set", "records", "unit", "columns", "mock", "tags", "description", "added")
    for owned in catalogue.search():
        columns = "\n".join(f"{name}: {type_}" for name, type_ in owned.columns.items())
        mock = f"{owned.mock:,}" if owned.mock else "none"
        cells = (owned.name, f"{owned.count:,}", owned.unit, columns, mock, " ".join(owned.tags), owned.description)
        table.add_row(*map(escape, cells), f"{owned.created:%Y-%m-%d}")
    damaged = catalogue.damaged()
    if table.row_count or not damaged:
        console.print(table if table.row_count else "No data sets yet: housecall worker add NAME FILE...")
    for name, reason in damaged.items():
        console.print(f"{escape(name)} is damaged: {escape(reason)}", style="red", highlight=False)


def discard(folder: Path, name: str, *, ask: bool) -> bool:
    """Remove a data set, if the owner agrees."""
    catalogue = Catalogue(folder)
    if name not in catalogue.damaged():
        owned = catalogue.owned(name)
        typer.echo(f"Data set '{name}': {owned.count:,} records, added {owned.created:%Y-%m-%d}.")
    if ask and not _agreed("Remove it from this worker?"):
        typer.echo("Nothing was removed.")
        return False
    catalogue.remove(name)
    typer.echo(f"Data set '{name}' is removed.")
    if _unsigned(folder, name):
        typer.echo(
            f"Its policy counts no more; {POLICY_FOLDER}/{name}.toml stays, and needs your signature for other data."
        )
    return True


def verify(folder: Path, names: Sequence[str]) -> bool:
    """Check these data sets, or all, and say whose policy has a budget that does not fit. Whether all are whole."""
    catalogue = Catalogue(folder)
    public = public_key(folder) if (folder / PUBLIC_FILE).exists() else b""
    damaged = catalogue.damaged()
    whole = True
    for name in names or sorted((*catalogue.names(), *damaged)):
        try:
            if name in damaged:
                raise DataError(damaged[name])
            catalogue.check(name)
            typer.echo(f"{name}: whole")
            if trouble := unit_trouble(catalogue.owned(name), standing(folder, name, public)[0]):
                typer.secho(f"{name}: {trouble}", err=True, fg="yellow")
        except DataError as error:
            whole = False
            typer.secho(f"{name}: {error}", err=True, fg="red")
    return whole


def _agreed(question: str) -> bool:
    """What the owner says; a script, which cannot be asked, has said it by running the command."""
    return not sys.stdin.isatty() or typer.confirm(question)


def _progress(console: Console) -> Any:
    def shown(items: Iterable[Any], what: str, count: int) -> Iterable[Any]:
        return track(items, what, count, console=console, transient=True, disable=count < _BAR_FROM)

    return shown


def _preview(console: Console, owned: Owned, records: Records, mock: Any) -> None:
    """Everything that will be stored: schema, counts, extent, class numbers, the mock, and what was left out."""
    table = Table("column", "dtype", "shape of a record", "least", "greatest", "NaN", title=f"{owned.name}")
    for name, type_ in (*owned.columns.items(), *owned.withheld.items()):
        least, greatest, nans = _extent(records.columns[name])
        shape = " × ".join(map(str, type_.shape)) or "one value"
        table.add_row(escape(name), type_.dtype, shape, least, greatest, f"{nans:,}" if nans else "")
    console.print(table)
    lines = [f"{owned.count:,} records" + (f", tags {' '.join(owned.tags)}" if owned.tags else ", no tags")]
    lines += [f"{name} is made of {', '.join(sources)}" for name, sources in owned.sources.items()]
    lines += [f"{name} numbers {_numbered(values)}" for name, values in owned.classes.items()]
    lines += [f"{name} says whose record each is, and stays with you" for name in owned.withheld]
    lines.append(_said_of(owned, records, mock))
    if records.left_out:
        lines.append(f"left out: {', '.join(records.left_out)}")
    lines += [
        f"{name} is float64; models mostly are float32: --dtype {name}=float32"
        for name, type_ in owned.columns.items()
        if type_.dtype == "float64"
    ]
    for line in lines:
        console.print(escape(line), highlight=False, soft_wrap=True)


def _said_of(owned: Owned, records: Records, mock: Any) -> str:
    """What the owner should know of a mock before she stores it."""
    if not owned.mock:
        return "no mock: who finds it cannot try a program out (--mock generated, or --mock FILE)"
    said = f"a mock of {owned.mock:,} records, for whoever finds the data set"
    real = 0 if isinstance(mock, Fakes) else _real(records.columns, mock)
    if not real:
        return said
    return f"{said}. {real:,} OF THEM ARE RECORDS OF THE DATA, TOO: unless that is by chance, give no such mock"


def _real(columns: Mapping[str, torch.Tensor], mock: Mapping[str, torch.Tensor]) -> int:
    """How many records of a mock are, in all that is offered, records of the data."""
    made = set(_records(mock, mock))
    found = made.intersection(_records(columns, mock))
    return sum(record in found for record in _records(mock, mock))


def _records(columns: Mapping[str, torch.Tensor], names: Iterable[str]) -> Iterator[bytes]:
    """The bytes of each record."""
    parts = [columns[name] for name in names]
    each = max(sum(part[:1].numel() * part.element_size() for part in parts), 1)
    for pieces in zip(*(part.split(max(_STEP_BYTES // each, 1)) for part in parts), strict=True):
        flat = [piece.contiguous().reshape(len(piece), -1).view(torch.uint8) for piece in pieces]
        yield from map(bytes, torch.cat(flat, 1).numpy())


def _numbered(values: tuple[str, ...]) -> str:
    shown = ", ".join(f"{value} = {number}" for number, value in enumerate(values[:_CLASSES]))
    return shown + (f" and {len(values) - _CLASSES:,} more" if len(values) > _CLASSES else "")


def _extent(column: torch.Tensor) -> tuple[str, str, int]:
    """The least and the greatest value, NaN apart, and how many are NaN; a dash where there is no order."""
    if column.is_complex():
        return "-", "-", int(column.isnan().sum())
    record_bytes = max(column[:1].numel() * column.element_size(), 1)
    least: list[Any] = []
    greatest: list[Any] = []
    nans = 0
    for part in column.split(max(_STEP_BYTES // record_bytes, 1)):
        values = part.double() if column.is_floating_point() else part
        if column.is_floating_point():
            known = ~values.isnan()
            nans += values.numel() - int(known.sum())
            values = values[known]
        if values.numel():
            array = values.numpy()  # which orders the unsigned types too
            least.append(array.min().item())
            greatest.append(array.max().item())
    return _number(min(least, default=None)), _number(max(greatest, default=None)), nans


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
