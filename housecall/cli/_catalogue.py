"""What `housecall worker add|list|remove|check` do and show. Only those commands import it, since it imports torch.

What is printed here is the owner's own terminal: the least and the greatest value of a column may stand there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from ..errors import DataError
from ..worker.catalogue import Catalogue, Owned
from ..worker.readers.files import read
from ..worker.readers.records import Records, Request

__all__ = ["Addition", "discard", "show", "store", "verify"]

_STEP_BYTES = 64 << 20  # of a column are looked at together, so that a mapped file is not copied whole
_CLASSES = 20
_BAR_FROM = 200  # fewer items are done before a bar is seen


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
        "replace": addition.replace,
    }
    planned = Catalogue().register(addition.name, records.columns, **options)  # what is unfit is refused before asking
    if not addition.replace and addition.name in (*catalogue.names(), *catalogue.damaged()):
        raise DataError(f"there is a data set '{addition.name}' already: choose another name, or pass --replace")
    _preview(console, planned, records)
    if ask and not _agreed(f"Store it in {folder}?"):
        console.print("Nothing was stored.")
        return False
    catalogue.add(addition.name, records.columns, **options)
    console.print(f"Data set '{escape(addition.name)}' is stored: {planned.count:,} records.", highlight=False)
    return True


def show(folder: Path) -> None:
    """All data sets, by name, without a value."""
    console = Console()
    catalogue = Catalogue(folder)
    table = Table("data set", "records", "columns", "tags", "description", "added")
    for owned in catalogue.search():
        columns = "\n".join(f"{name}: {type_}" for name, type_ in owned.columns.items())
        cells = (owned.name, f"{owned.count:,}", columns, " ".join(owned.tags), owned.description)
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
    return True


def verify(folder: Path, names: Sequence[str]) -> bool:
    """Check these data sets, or all. Whether all are whole."""
    catalogue = Catalogue(folder)
    damaged = catalogue.damaged()
    whole = True
    for name in names or sorted((*catalogue.names(), *damaged)):
        try:
            if name in damaged:
                raise DataError(damaged[name])
            catalogue.check(name)
            typer.echo(f"{name}: whole")
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


def _preview(console: Console, owned: Owned, records: Records) -> None:
    """Everything that will be stored: schema, counts, extent, class numbers, and what was left out."""
    table = Table("column", "dtype", "shape of a record", "least", "greatest", "NaN", title=f"{owned.name}")
    for name, type_ in owned.columns.items():
        least, greatest, nans = _extent(records.columns[name])
        shape = " × ".join(map(str, type_.shape)) or "one value"
        table.add_row(escape(name), type_.dtype, shape, least, greatest, f"{nans:,}" if nans else "")
    console.print(table)
    lines = [f"{owned.count:,} records" + (f", tags {' '.join(owned.tags)}" if owned.tags else ", no tags")]
    lines += [f"{name} is made of {', '.join(sources)}" for name, sources in owned.sources.items()]
    lines += [f"{name} numbers {_numbered(values)}" for name, values in owned.classes.items()]
    if records.left_out:
        lines.append(f"left out: {', '.join(records.left_out)}")
    lines += [
        f"{name} is float64; models mostly are float32: --dtype {name}=float32"
        for name, type_ in owned.columns.items()
        if type_.dtype == "float64"
    ]
    for line in lines:
        console.print(escape(line), highlight=False, soft_wrap=True)


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
