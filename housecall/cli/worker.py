"""`housecall worker ...`: what an owner does with a worker on her machine. Torch is imported by what needs it."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import UsageError
from ..host.config import CONFIG_FILE, Config
from ..identity.enrolment import join
from ..identity.invitation import Invitation
from ..owner.files import make_folder
from ..owner.signing import OwnerKey

__all__ = ["Folder", "app", "in_folder", "worker_folder"]

app = typer.Typer(help="Run a worker beside your data, and choose what it offers.", no_args_is_help=True)

Folder = Annotated[
    Path | None, typer.Option(help="The worker's folder.", show_default=f"this one, if it holds a {CONFIG_FILE}")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="What the worker is called: letters, digits, '-', '.', '_'.")],
    folder: Annotated[Path | None, typer.Option(help="Where it is made.", show_default="./NAME")] = None,
    listen: Annotated[
        str | None, typer.Option(help="HOST:PORT to listen at.", show_default="127.0.0.1:7443, this machine only")
    ] = None,
    invitation: Annotated[
        Path | None, typer.Option(help="Join the authority that made this invitation: makes key and certificate.")
    ] = None,
) -> None:
    """Make a worker: a folder with its settings, room for its data, and, with an invitation, its keys."""
    place = folder if folder is not None else Path(name)
    invited = Invitation.load(invitation) if invitation is not None else None
    config = Config.create(place, name, listen)
    typer.echo(f"Worker '{config.name}' is in {place}, and will listen at {config.listen}. Its settings: {CONFIG_FILE}")
    OwnerKey.create(place)
    from ..owner.policies import POLICY_FOLDER  # numpy comes with what policies say: here, so that --help stays quick

    make_folder(place / POLICY_FOLDER)
    typer.echo("owner.key signs what you decide about your data: keep it, and keep it to yourself")
    keys = place / config.identity.folder
    if invited is not None:
        made = join(invited, keys)
        typer.echo(
            f"It is {made.principal}, until {made.not_after:%Y-%m-%d %H:%M} UTC; `worker up` renews that in time."
        )
    else:
        typer.echo(f"It has no keys yet: housecall ca join INVITATION --out {keys}")
    typer.echo(f"Next: housecall worker add DATASET FILE... --tags '#TAG' --folder {place}")


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="What the data set is called.")],
    files: Annotated[
        list[Path], typer.Argument(help="npz, csv, idx, safetensors, parquet, or a folder of images by class.")
    ],
    tags: Annotated[list[str] | None, typer.Option(help="Tags to find it by: '#mnist #digits'.")] = None,
    description: Annotated[str, typer.Option(help="A sentence for those who search.")] = "",
    columns: Annotated[
        list[str] | None, typer.Option(help="x=a,b,c makes column x of a, b, c; repeat it. Others are left out.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="A text column (csv, parquet) whose values become 0, 1, 2 ...")
    ] = None,
    missing: Annotated[
        Literal["refuse", "nan"], typer.Option(help="What a missing number (csv, parquet) becomes.")
    ] = "refuse",
    dtype: Annotated[list[str] | None, typer.Option(help="x=float32 converts column x; repeat it.")] = None,
    size: Annotated[str | None, typer.Option(help="HxW in pixels, to which images are scaled.")] = None,
    mock: Annotated[
        list[str] | None,
        typer.Option(help="Made-up records for whoever finds it: files, read as the data is, or the word 'generated'."),
    ] = None,
    range_: Annotated[
        list[str] | None,
        typer.Option("--range", help="y=0:2 generates y from 0 to 2. It is public: do not read it off the data."),
    ] = None,
    mock_records: Annotated[int | None, typer.Option(help="How many to generate.", show_default="100")] = None,
    person: Annotated[
        str, typer.Option(help="The column that says whose record each is: protects persons, and stays with you.")
    ] = "",
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of a data set of this name.")] = False,
    folder: Folder = None,
    yes: Yes = False,
) -> None:
    """Add a data set: it is read, shown as it will be, and stored once you agree."""
    place = worker_folder(folder)
    from ._catalogue import Addition, Mock, store  # torch is imported here, so that --help stays quick

    addition = Addition(
        name,
        files,
        tags=_tags(tags or ()),
        description=description,
        columns={key: _names(value) for key, value in _pairs(columns or (), "--columns", "x=a,b,c")},
        labels=tuple(label or ()),
        missing=missing,
        size=_size(size),
        dtypes=dict(_pairs(dtype or (), "--dtype", "x=float32")),
        mock=Mock.of(mock or (), mock_records, _ranges(range_ or ())),
        person=person,
        replace=replace,
    )
    if not store(place, addition, ask=not yes):
        raise typer.Exit(1)


@app.command("list")
def list_(folder: Folder = None) -> None:
    """Show the data sets: what anyone who searches may learn of them."""
    place = worker_folder(folder)
    from ._catalogue import show  # as in `add`

    show(place)


@app.command()
def remove(name: Annotated[str, typer.Argument(help="The data set.")], folder: Folder = None, yes: Yes = False) -> None:
    """Remove a data set from the worker. The files that it was read from stay."""
    place = worker_folder(folder)
    from ._catalogue import discard  # as in `add`

    if not discard(place, name, ask=not yes):
        raise typer.Exit(1)


@app.command()
def check(
    names: Annotated[list[str] | None, typer.Argument(help="Data sets.", show_default="all")] = None,
    folder: Folder = None,
) -> None:
    """Read data sets through and compare them with what was added. Fails if one is damaged."""
    place = worker_folder(folder)
    from ._catalogue import verify  # as in `add`

    if not verify(place, names or ()):
        raise typer.Exit(1)


def worker_folder(folder: Path | None) -> Path:
    """The folder that a command is about. Raises `UsageError` if no worker lives there."""
    place = Path() if folder is None else folder
    if not (place / CONFIG_FILE).is_file():
        here = "here" if folder is None else f"in {folder}"
        raise UsageError(
            f"no worker lives {here} (there is no {CONFIG_FILE}): go to a worker's folder, pass --folder, or make one "
            "with `housecall worker init NAME`"
        )
    return place


def in_folder(place: Path) -> str:
    """What a command that is told of needs besides, to be about the same folder."""
    return "" if place == Path() else f" --folder {place}"


def _tags(texts: Iterable[str]) -> tuple[str, ...]:
    """Tags, however they were separated; the '#', which a shell takes for a comment, may be left out."""
    words = [word for text in texts for word in re.split(r"[\s,]+", text) if word]
    return tuple(word if word.startswith("#") else f"#{word}" for word in words)


def _pairs(texts: Sequence[str], option: str, example: str) -> list[tuple[str, str]]:
    pairs = [(key.strip(), value.strip()) for key, _, value in (text.partition("=") for text in texts)]
    for text, (key, value) in zip(texts, pairs, strict=True):
        if not key or not value or not all(_names(value)):
            raise UsageError(f"{option} {text}: expected a form such as {example}")
    if len({key for key, _ in pairs}) < len(pairs):
        raise UsageError(f"{option} names one column twice: {', '.join(key for key, _ in pairs)}")
    return pairs


def _ranges(texts: Sequence[str]) -> dict[str, int | tuple[float, float]]:
    """What `--range` says: LEAST:GREATEST, or a number of classes."""
    found: dict[str, int | tuple[float, float]] = {}
    for text, (name, given) in zip(texts, _pairs(texts, "--range", "y=0:2"), strict=True):
        try:
            ends = [int(end) if re.fullmatch(r"[+-]?[0-9]+", end.strip()) else float(end) for end in given.split(":")]
            found[name] = (ends[0], ends[1]) if len(ends) == 2 else int(*map(str, ends))
        except (ValueError, TypeError):
            raise UsageError(f"--range {text}: expected a form such as x=0:1.5, or y=3 for 0, 1 and 2") from None
    return found


def _names(text: str) -> tuple[str, ...]:
    """Names between commas, as in a row of a csv file: one that has a comma itself stands in double quotes."""
    return tuple(name.strip() for name in next(csv.reader([text], skipinitialspace=True), [""]))


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,5})[x×]([0-9]{1,5})", text)
    if not match:
        raise UsageError(f"--size {text}: expected HEIGHTxWIDTH in pixels, such as 224x224")
    return int(match[1]), int(match[2])
