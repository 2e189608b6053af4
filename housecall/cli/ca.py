"""`housecall ca`: an authority of one's own, and membership in somebody's."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..identity.authority import LIFETIME, Authority
from ..identity.certificate import Identity, utc_now
from ..identity.enrolment import EnrolmentServer, authority_url
from ..identity.enrolment import join as join_authority
from ..identity.enrolment import renew as renew_identity
from ..identity.index import Invited, Issued
from ..identity.invitation import Invitation

__all__ = ["ca"]

ca = typer.Typer(help="Identities: make an authority, invite, join, renew, revoke.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="The authority's folder.")]
Ca = Annotated[Path, typer.Option("--ca", help="The authority's folder.")]
Name = Annotated[str, typer.Argument(help="1 to 63 letters, digits and '-._'.")]
Role = Annotated[str, typer.Option(help="worker (holds data, serves) or scientist (connects to workers).")]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--host", help="DNS name or IP address by which clients reach the worker; may be given again."),
]
Url = Annotated[str, typer.Option(help="HOST:PORT where newcomers will reach `housecall ca serve`.")]


@ca.command()
def init(
    folder: Folder = Path("ca"),
    name: Annotated[str, typer.Option(help="What the authority is called in certificates.")] = "housecall",
    url: Url = "",
) -> None:
    """Make an authority. Whoever holds its folder can become anyone in the federation: keep it, and keep a copy."""
    made = Authority.create(folder, name, url=url)
    typer.echo(f"{made.folder}: authority '{made.name}' is made. Next:  housecall ca invite NAME --ca {folder}")


@ca.command()
def invite(
    name: Name,
    role: Role = "worker",
    host: Hosts = None,
    url: Url = "",
    days: Annotated[float, typer.Option(help="How long the invitation can be used.", min=0.001, max=365)] = 1.0,
    out: Annotated[
        str, typer.Option(help="File for the invitation; - prints it.", show_default="NAME.invitation")
    ] = "",
    folder: Ca = Path("ca"),
) -> None:
    """Let whoever is handed the invitation become NAME, once."""
    made = Authority.load(folder).invite(name, role, host or (), timedelta(days=days), url)
    if out == "-":
        typer.echo(made.text(), nl=False)
        return
    path = Path(out or f"{name}.invitation")
    made.save(path)
    where = "" if made.url else " It names no URL: only with one can it be used by `housecall ca join`."
    typer.echo(f"{path}: hand it over like a password; it works once, until {made.expires:%Y-%m-%d %H:%M} UTC.{where}")


@ca.command()
def issue(
    name: Name,
    role: Role = "scientist",
    host: Hosts = None,
    days: Annotated[float, typer.Option(help="How long the certificate lives.", min=0.001, max=90)] = LIFETIME.days,
    out: Annotated[Path | None, typer.Option(help="Folder or .pem file.", show_default="NAME.pem")] = None,
    folder: Ca = Path("ca"),
) -> None:
    """Make key and certificate here, for a machine that cannot reach the authority. Prefer an invitation: with it
    the key never travels."""
    made = Authority.load(folder).identity(name, role, host or (), timedelta(days=days))
    path = made.save(out or Path(f"{name}.pem"))
    typer.echo(f"{path}: {made.principal} until {made.not_after:%Y-%m-%d %H:%M} UTC. It holds the private key.")


@ca.command()
def serve(
    folder: Folder = Path("ca"),
    listen: Annotated[str, typer.Option(help="HOST:PORT to listen on.")] = "127.0.0.1:7440",
) -> None:
    """Answer newcomers and renewals until Ctrl-C."""
    authority = Authority.load(folder)
    with EnrolmentServer(authority, listen) as server:
        typer.echo(f"authority '{authority.name}' listens on {server.address}")
        try:
            server.wait()
        except KeyboardInterrupt:
            typer.echo("stopped")


@ca.command()
def join(
    invitation: Annotated[Path, typer.Argument(help="The invitation that was handed over.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the identity.", show_default="NAME")] = None,
) -> None:
    """Become whom the invitation names: the key is made here and stays here."""
    found = Invitation.load(invitation)
    folder = out or Path(found.name)
    made = join_authority(found, folder)
    typer.echo(
        f"{folder}: {made.principal} until {made.not_after:%Y-%m-%d %H:%M} UTC. The invitation is spent: delete it."
    )


@ca.command()
def renew(folder: Annotated[Path, typer.Argument(help="The identity's folder.")]) -> None:
    """Exchange an identity for one with a new key and a new end, whether or not it is time."""
    new = renew_identity(Identity.load(folder), authority_url(folder))
    new.save(folder)
    typer.echo(f"{folder}: {new.principal} until {new.not_after:%Y-%m-%d %H:%M} UTC")


@ca.command()
def revoke(
    who: Annotated[str, typer.Argument(metavar="NAME|SERIAL", help="As `housecall ca list` shows it.")],
    folder: Ca = Path("ca"),
) -> None:
    """End a name's certificates and its open invitation, or one certificate, before their time."""
    authority = Authority.load(folder)
    for issued in authority.revoke(who):
        typer.echo(f"revoked: {issued.role} '{issued.name}', serial {issued.serial}")
    typer.echo(f"{authority.folder / 'crl.pem'} says so from now on; workers fetch it within a minute")


@ca.command("list")
def list_(folder: Ca = Path("ca")) -> None:
    """Who has a certificate, and who is invited."""
    authority = Authority.load(folder)
    table = Table(title=f"authority '{authority.name}'")
    for title in ("name", "role", "hosts", "until (UTC)", "state", "serial"):
        table.add_column(title, overflow="fold")
    for issued in authority.issued():
        table.add_row(*_row(issued, _state(issued)), issued.serial)
    for invited in authority.invited():
        if invited.used is None:
            table.add_row(*_row(invited, _invited_state(invited)), "")
    Console().print(table)


def _row(entry: Issued | Invited, state: str) -> tuple[str, ...]:
    until = entry.not_after if isinstance(entry, Issued) else entry.expires
    return entry.name, entry.role, "\n".join(entry.hosts), f"{until:%Y-%m-%d %H:%M}", state


def _state(issued: Issued) -> str:
    if issued.revoked is not None:
        return f"revoked {issued.revoked:%Y-%m-%d}"
    return "valid" if issued.not_after >= utc_now() else "ended"


def _invited_state(invited: Invited) -> str:
    if invited.withdrawn is not None:
        return "invitation withdrawn"
    return "invited" if invited.expires >= utc_now() else "invitation ended"
