"""`housecall worker requests|show|approve|deny`: what scientists ask, and what the owner answers."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import PolicyError, UsageError
from ..owner.approvals import APPROVAL_HOURS, MAX_USES, Request, Requests
from ..owner.policies import standing
from ..owner.policy import Asked, decide
from ..owner.signing import OwnerKey, public_key
from .worker import Folder, Yes, worker_folder

__all__ = ["approve", "deny", "requests", "show"]

Number = Annotated[str, typer.Argument(metavar="N", help="A request, or the first characters of its name.")]


def requests(
    folder: Folder = None,
    everything: Annotated[bool, typer.Option("--all", help="Those that were answered, too.")] = False,
) -> None:
    """Show what scientists ask for."""
    kept = _requests(worker_folder(folder))
    found = kept.all() if everything else kept.pending()
    if not found:
        typer.echo("No requests." if everything else "No requests wait.")
        return
    table = Table("request", "from", "when (UTC)", "asks for", "of", "status", "reason")
    for request in found:
        when = f"{request.when.astimezone(UTC):%Y-%m-%d %H:%M}"
        runs = f", {request.runs:,} times" if request.runs > 1 else ""
        asks = f"{request.kind} {request.digest[:12]}{runs}"
        reason = request.reason.partition("\n")[0][:60]
        cells = (request.id, _who(request), when, asks, " + ".join(request.data_sets), request.status, reason)
        table.add_row(*map(escape, cells))
    Console().print(table)
    typer.echo("Read one:  housecall worker show N")


def show(number: Number, folder: Folder = None) -> None:
    """Print a request: who asks, why, the program itself, and what an approval could reveal."""
    place = worker_folder(folder)
    _print(place, _found(_requests(place), number))


def approve(
    number: Number,
    uses: Annotated[int, typer.Option(help="How often it may be used.", min=1, max=MAX_USES)] = 1,
    any_number: Annotated[
        bool, typer.Option("--any-number", help="As often as wanted until it ends: for a program that you trust.")
    ] = False,
    release: Annotated[
        bool,
        typer.Option("--release", help="Of a program: what its runs make may leave, exactly, without asking again."),
    ] = False,
    hours: Annotated[float, typer.Option(help="For how long.", min=0.01, max=24 * 366)] = APPROVAL_HOURS,
    words: Annotated[str, typer.Option(help="A sentence for whoever asked.")] = "",
    folder: Folder = None,
    yes: Yes = False,
) -> None:
    """Let whoever asked have a value, or run a program, once unless you say more; signed with the owner's key."""
    place = worker_folder(folder)
    key = OwnerKey.load(place)
    kept = _requests(place)
    request = _found(kept, number)
    uses = MAX_USES if any_number else uses
    if not yes:
        _print(place, request)
        leaves = ", AND LET OUT WHAT ITS RUNS MAKE" if release else ""
        if not typer.confirm(f"Approve it, {_often(uses)} within {hours:g} hours{leaves}?"):
            typer.echo("Nothing was approved.")
            raise typer.Exit(1)
    expires = datetime.now(UTC) + timedelta(hours=hours)
    made = kept.approve(request.id, key, uses, expires, words, release=release)
    leaves = ", and what its runs make may leave" if made.release else ""
    where = f" --folder {place}" if folder else ""
    typer.echo(
        f"{request.id} is approved for {_who(request)}: {_often(made.uses)} until {made.expires:%Y-%m-%d %H:%M} UTC"
        f"{leaves}. To withdraw it: housecall worker deny {request.id}{where} --reason TEXT"
    )
    for problem in _without_effect(place, request):
        typer.secho(f"But as the policies stand it has no effect: {problem}", err=True, fg="yellow")


def deny(
    number: Number,
    reason: Annotated[str, typer.Option(help="Why; whoever asked reads it.")],
    folder: Folder = None,
) -> None:
    """Answer no, or withdraw what is left of an approval."""
    kept = _requests(worker_folder(folder))
    denied = kept.deny(_found(kept, number).id, reason)
    typer.echo(f"{denied.id} of {_who(denied)} is denied")


def _often(uses: int) -> str:
    if uses == MAX_USES:
        return "any number of times"
    return f"{uses:,} time{'s' if uses > 1 else ''}"


def _requests(place: Path) -> Requests:
    return Requests(place, _public(place))


def _public(place: Path) -> bytes:
    """The owner's public key; reading requests needs none."""
    try:
        return public_key(place)
    except PolicyError:
        return b""


def _found(kept: Requests, number: str) -> Request:
    """The one request whose id begins so, or the first for this digest, if only one principal asks for that. Raises
    `UsageError` if there is none, or several."""
    everything = kept.all() if number else ()
    found = [request for request in everything if request.id.startswith(number)]
    if not found:
        alike = [request for request in everything if request.digest == number]
        if len({(request.principal, request.role) for request in alike}) > 1:
            those = ", ".join(f"{request.id} of {_who(request)}" for request in alike)
            raise UsageError(f"several ask for that digest: {those}. Say which request you mean")
        found = alike[:1]
    if len(found) != 1:
        several = f"{len(found)} requests begin with" if found else "no request begins with"
        raise UsageError(f"{several} {number!r}: `housecall worker requests --all` lists them")
    return found[0]


def _who(request: Request) -> str:
    return f"{request.role} '{request.principal}'".strip()


def _print(place: Path, request: Request) -> None:
    """All that an owner needs to decide; what came from outside is printed as it is, never as markup."""
    lines = [
        f"request   {request.id}, {request.status}" + (f": {request.words}" if request.words else ""),
        f"from      {_who(request)}, {request.when.astimezone(UTC):%Y-%m-%d %H:%M} UTC",
        f"asks for  {request.kind} {request.digest}{f', to run {request.runs:,} times' * (request.runs > 1)}",
        f"of        {' + '.join(request.data_sets)}",
        "reason    " + request.reason.replace("\n", "\n          "),
        "",
        request.program or "(no program was recorded)",
        "",
        *_reveals(request),
        *(f"As the policies stand an approval has no effect: {problem}" for problem in _without_effect(place, request)),
    ]
    for line in lines:
        Console().print(escape(line), highlight=False, soft_wrap=True)


def _reveals(request: Request) -> Iterator[str]:
    """What an approval could reveal, in words. Nobody can bound it by reading: so it says what is certain."""
    of = " and ".join(request.data_sets)
    if request.kind == "value":
        yield f"If you approve, {_who(request)} receives this one value exactly, computed from {of} as printed above."
        yield "It can hold records as they are, or tell of them: a gradient or a model can be inverted, a sum over all"
        yield "records less one gives that one. Read what the program does with the records before the last line."
    else:
        yield f"If you approve, {_who(request)} may run this program on {of}: on the columns that it names, no others."
        yield "Running alone lets nothing out: what it makes stays here until a release is allowed, by the policies or"
        yield "by an approval of its own. With --release you approve that too: all that it makes, as listed above, may"
        yield "leave exactly, after each run. What was brought (a model's parameters, the numbers of rows) you do not"
        yield "see: ask yourself what the program gives for the worst that could stand there."


def _without_effect(place: Path, request: Request) -> Iterator[str]:
    """Why the policies would refuse it even with an approval."""
    public = _public(place)
    policies = {name: standing(place, name, public)[0] for name in request.data_sets}
    asked = Asked(
        "exact" if request.kind == "value" else "plan",
        request.principal,
        request.role,
        digest=request.digest,
        approved=True,
    )
    decision = decide(policies, request.data_sets, asked, datetime.now(UTC))
    if not decision.allowed:
        yield f"{decision.data_set}: {decision.rule}"
