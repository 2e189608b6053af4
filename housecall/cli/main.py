"""`housecall`: the commands by name, and errors as a person wants to read them."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from .. import __version__
from ..errors import HousecallError
from . import ca, policy, worker
from .demo import demo
from .ledger import ledger
from .requests import approve, deny, requests, show
from .status import status
from .up import up

__all__ = ["app", "main"]

app = typer.Typer(
    help="Train PyTorch models on data that stays with its owners.", no_args_is_help=True, add_completion=False
)
app.command()(demo)
worker.app.command()(up)
worker.app.command()(status)
worker.app.add_typer(policy.app, name="policy")
for command in (requests, show, approve, deny, ledger):
    worker.app.command()(command)
app.add_typer(worker.app, name="worker")
app.add_typer(ca.ca, name="ca")


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version and leave.")) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command that the arguments name. What is for its user to mend is one message and status 2: an error of
    ours, or of the system, as of a file that may not be read."""
    try:
        app()
    except HousecallError as error:
        _end(str(error))
    except OSError as error:
        _end(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))


def _end(message: str) -> NoReturn:
    typer.secho(f"housecall: {message}", err=True, fg="red")
    sys.exit(2)
