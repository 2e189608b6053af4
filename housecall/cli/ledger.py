"""`housecall worker ledger`: what was asked, decided and let out, and whether that account is whole."""

from __future__ import annotations

from collections import deque
from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from cryptography.hazmat.primitives import serialization
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import LedgerError, UsageError
from ..identity.certificate import Identity, utc_now
from ..owner.heads import Countersigned, Head, countersign, read_text
from ..owner.ledger import Account, Entry, Sealed
from ..owner.signing import public_key
from .worker import Folder, worker_folder

__all__ = ["ledger"]


def ledger(
    folder: Folder = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, an entry a line, for programs.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every byte: finds any edit, deletion, reorder or cut.")
    ] = False,
    head: Annotated[bool, typer.Option("--head", help="Print the signed head: for others to keep.")] = False,
    extends: Annotated[
        list[Path] | None, typer.Option(help="A head kept from earlier: check that this history goes on from it.")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="A countersigned head: check it, and ask for it at every --verify from now on.")
    ] = None,
    countersigned: Annotated[
        Path | None,
        typer.Option("--countersign", help="A head: sign it with --identity and print that. Needs no worker."),
    ] = None,
    identity: Annotated[Path | None, typer.Option(help="With --countersign: whose signature it is.")] = None,
    key: Annotated[str, typer.Option(help="The key that must have signed, hexadecimal, as in a head.")] = "",
    last: Annotated[int | None, typer.Option(min=1, help="Show only so many, the latest.", show_default="all")] = None,
) -> None:
    """Show the ledger: who asked for what, what was decided, and all that left."""
    if sum((verify or bool(extends), head, keep is not None, countersigned is not None)) > 1:
        raise UsageError("--verify, --head, --keep and --countersign are different questions: ask one at a time")
    if countersigned is not None:
        typer.echo(_countersigned(countersigned, identity).text())
        return
    account = Account(worker_folder(folder), _key(key))
    if keep is not None:
        account.keep(Countersigned.parse(read_text(keep), str(keep)))
        typer.echo("kept: from now on --verify checks that this history goes on from it")
    elif head:
        typer.echo(account.head().text())
    elif verify or extends:
        _verify(account, extends or (), as_json)
    else:
        spent = _show(account, last, as_json)
        if spent and not as_json:
            _show_budgets(worker_folder(folder))


def _countersigned(path: Path, identity: Path | None) -> Countersigned:
    if identity is None:
        raise UsageError("--countersign needs --identity: whose signature it is")
    found = Identity.load(identity)
    public = found.parsed.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return countersign(Head.parse(read_text(path), str(path)), str(found.principal), public, found.sign, utc_now)


def _key(text: str) -> bytes | None:
    try:
        return bytes.fromhex(text) if text else None
    except ValueError:
        raise UsageError(f"--key {text[:80]}: expected hexadecimal digits, as 'key' in a head") from None


def _verify(account: Account, extends: list[Path] | tuple[()], as_json: bool) -> None:
    found = account.verify([Head.parse(read_text(path), str(path)) for path in extends])
    if as_json:
        typer.echo(msgspec.json.encode(found).decode())
        return
    if found.head is None:
        typer.echo("The ledger is empty.")
        return
    fits = f" It goes on from {found.known} heads that were kept." if found.known else ""
    busy = " A worker is writing: lines that it has not acknowledged yet are no part of this." if found.pending else ""
    typer.echo(
        f"The ledger is whole: {found.entries:,} entries, the last of {_time(found.head.time)}.{fits}{busy}\n"
        f"Key {found.head.key}"
    )


def _show(account: Account, last: int | None, as_json: bool) -> bool:
    """What is right is shown, then the error of the first line that is wrong. Whether some of a budget was spent."""
    spent = False
    shown: deque[Sealed] = deque(maxlen=last)
    error: LedgerError | None = None
    try:
        for sealed in account.entries():
            spent = spent or sealed.entry.kind == "reserve"
            if as_json and not last:
                typer.echo(msgspec.json.encode(sealed).decode())
            else:
                shown.append(sealed)
    except LedgerError as found:
        error = found
    if as_json:
        for sealed in shown:
            typer.echo(msgspec.json.encode(sealed).decode())
    else:
        Console().print(_table(shown))
    if error is not None:
        raise error
    return spent


def _show_budgets(place: Path) -> None:
    """What is spent of each budget, and what is left."""
    from ._budgets import budgets  # torch is imported here, so that a ledger without any is shown quickly

    for line in budgets(place, public_key(place)):
        typer.echo(f"budget of {line}")


def _table(entries: deque[Sealed]) -> Table:
    table = Table("", "time (UTC)", "what", "who", "data", "program", "stages", "cost", "decision")
    for sealed in entries:
        entry = sealed.entry
        cells = (
            _time(sealed.time),
            entry.kind if entry.of is None else f"{entry.kind} {entry.of}",
            entry.principal,
            " + ".join(entry.data_sets),
            entry.program[:12],
            " > ".join(entry.pipeline),
            _cost(entry),
            entry.decision or entry.details,
        )
        table.add_row(f"{sealed.sequence:,}", *(Text(_plain(cell)) for cell in cells))
    return table


def _cost(entry: Entry) -> str:
    cost = entry.privacy
    if entry.kind == "release" and entry.of is not None:  # so that nobody adds it up twice
        return f"paid: entry {entry.of}"
    if cost is None:
        return ""
    paid = f"ε {cost.epsilon:g}, δ {cost.delta:g}" if cost.rho is msgspec.UNSET else f"ρ {cost.rho:.4g}"
    return f"{paid} per {cost.unit}"


def _time(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S}"


def _plain(text: str) -> str:
    """A text that others chose, without what a terminal would obey: control and direction characters as escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
