"""`housecall worker policy ...`: what an owner's rules say, in words, and her signature under them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from ..errors import PolicyError
from ..host.config import DATA_FOLDER
from ..owner.change import changes, warnings
from ..owner.explanation import explain as explained
from ..owner.policies import POLICY_FOLDER, draft, policy_names, standing
from ..owner.policies import sign as put_in_force
from ..owner.policy import Policy
from ..owner.signing import KEY_FILE, PUBLIC_FILE, OwnerKey, public_key
from .worker import Folder, Yes, in_folder, worker_folder

__all__ = ["app"]

app = typer.Typer(help="The rules of each data set: check, show, explain, sign.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The data set.")]


@app.command()
def check(
    names: Annotated[list[str] | None, typer.Argument(help="Data sets.", show_default="all with a policy")] = None,
    folder: Folder = None,
) -> None:
    """Say whether policies are well-formed, signed and not over, and what is loose. Fails if one does not hold.

    Says as well whose budget does not fit its data, and which data sets have no policy."""
    place = worker_folder(folder)
    whole = True
    for name in () if names else sorted(_data_sets(place).difference(policy_names(place))):
        typer.secho(f"{name}: nobody may use it: there is no policy ({_begin(place, name)})", fg="yellow")
    for name in names or policy_names(place):
        policy, why = standing(place, name, _public(place))
        if why:
            whole = False
            typer.secho(f"{name}: NOTHING IS PERMITTED: {why}", err=True, fg="red")
            continue
        typer.echo(f"{name}: version {policy.version} is in force")
        for warning in warnings(policy, _now()):
            typer.secho(f"  note: {warning}", fg="yellow")
        trouble = _unit_trouble(place, name, policy)
        if trouble:
            typer.secho(f"  ITS BUDGET PAYS FOR NOTHING: {trouble}", err=True, fg="red")
        whole = whole and not trouble and not _over(policy)
    if not whole:
        raise typer.Exit(1)


@app.command()
def show(name: Name, folder: Folder = None) -> None:
    """Print the policy of a data set as it is written; without one, one that refuses everything, to begin with."""
    place = worker_folder(folder)
    _, why = standing(place, name, _public(place))
    path = place / POLICY_FOLDER / f"{name}.toml"
    if path.is_file() and path.stat().st_size:  # `show NAME > policies/NAME.toml` has made an empty one
        typer.echo(path.read_text(encoding="utf-8", errors="replace"), nl=False)
    else:
        typer.echo(Policy.deny().text(), nl=False)
        typer.secho(
            f"Save it as {path}, edit it, then: housecall worker policy sign {name}{in_folder(place)}", err=True
        )
    if why:
        typer.secho(f"# nothing is permitted: {why}", err=True, fg="red")


@app.command()
def explain(
    name: Name,
    principal: Annotated[str | None, typer.Argument(help="Who.", show_default="all that it names")] = None,
    role: Annotated[str, typer.Option(help="In what role.")] = "scientist",
    folder: Folder = None,
) -> None:
    """Say in words what somebody could obtain from a data set, as its policy stands."""
    place = worker_folder(folder)
    policy, why = standing(place, name, _public(place))
    if why:
        typer.echo(f"Nothing, for nobody: {why}")
        return
    for who, what in [(principal, role)] if principal is not None else _named(policy, role):
        typer.secho(f"{what} '{who}'" if who else f"any other {what}", bold=True)
        for line in explained(policy, who, what, _now()):
            typer.echo(f"  {line}")
    if policy.budget.epsilon:
        from ._budgets import budgets  # torch is imported here, so that other policies are explained quickly

        for line in budgets(place, _public(place), only=name):
            typer.echo(f"budget of {line}")


@app.command()
def sign(
    name: Name,
    folder: Folder = None,
    yes: Yes = False,
) -> None:
    """Put a policy in force: shows what it changes and what becomes looser, asks, and signs with the owner's key."""
    place = worker_folder(folder)
    key = owner_key(place)
    made = draft(place, name, key.public)
    _check_unit(place, name, made.policy)
    if made.signed:
        typer.echo(f"{name}: version {made.policy.version} is signed already")
        return
    found = changes(made.old, made.policy)
    typer.echo(f"{name}: version {made.policy.version}, against what was signed last:")
    for change in found:
        typer.secho(f"  {change}", fg="red" if change.loosens else "green")
    if not found:
        typer.echo("  permits the same as before")
    for warning in filter(None, (*warnings(made.policy, _now()), _unit_trouble(place, name, made.policy))):
        typer.secho(f"  note: {warning}", fg="yellow")
    looser = any(change.loosens for change in found)
    if not yes and not typer.confirm("It permits MORE than before. Sign it?" if looser else "Sign it?"):
        typer.echo("Nothing was signed: what is written there counts for nothing.")
        raise typer.Exit(1)
    put_in_force(place, made, key)
    typer.echo(f"{name}: version {made.policy.version} is in force")


def owner_key(place: Path) -> OwnerKey:
    """The owner's key of a worker; made at its first use. Raises `PolicyError` if it is damaged or half is lost."""
    if (place / KEY_FILE).exists() or (place / PUBLIC_FILE).exists():
        return OwnerKey.load(place)
    made = OwnerKey.create(place)
    typer.echo(f"{place / KEY_FILE} is made: what it signs is your word. Keep a copy; it is for you alone.")
    return made


def _check_unit(place: Path, name: str, policy: Policy) -> None:
    """Refuse a budget that protects less than its data set asks for. Raises `PolicyError`."""
    if policy.budget.unit == "record" and (trouble := _unit_trouble(place, name, policy)):
        raise PolicyError(trouble)


def _unit_trouble(place: Path, name: str, policy: Policy) -> str:
    """Why the budget of a policy pays for nothing of its data set; empty if it does, or there is no such data."""
    if not (policy.budget.epsilon or policy.budget.delta):
        return ""
    from ..owned.catalogue import Catalogue  # torch is imported here, so that other policies are signed quickly
    from ..owned.description import unit_trouble

    known = {owned.name: owned for owned in Catalogue(place).search()}
    return unit_trouble(known[name], policy) if name in known else ""


def _data_sets(place: Path) -> set[str]:
    """The names of the data sets that lie there, damaged ones too; without torch."""
    return {path.stem for path in (place / DATA_FOLDER).glob("*.toml")}


def _begin(place: Path, name: str) -> str:
    return f"to begin with one: housecall worker policy show {name}{in_folder(place)}"


def _public(place: Path) -> bytes:
    """The owner's public key; before there is one nothing is signed."""
    return public_key(place) if (place / PUBLIC_FILE).exists() else b""


def _over(policy: Policy) -> bool:
    return policy.expires is not None and policy.expires <= _now()


def _named(policy: Policy, role: str) -> list[tuple[str, str]]:
    """Whom a policy names, and last whoever else has the role."""
    use = policy.use
    named: dict[tuple[str, str], None] = {}
    for entry in sorted({*use.interactive, *use.plans, *use.statistics, *policy.release.exact}):
        in_role, _, who = entry.rpartition("/")
        named[("" if who == "*" else who, in_role or role)] = None
    named.pop(("", role), None)
    return [*named, ("", role)]


def _now() -> datetime:
    return datetime.now(UTC)
