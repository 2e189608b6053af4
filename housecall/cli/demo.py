"""`housecall demo`: the article, on real MNIST. Two schools train one digit classifier; no image leaves its school.

The loop is the article's: send the model where the batch lies, train there with plain torch code, bring it home.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError

__all__ = ["demo"]


def demo(
    context: typer.Context,
    data: Annotated[Path, typer.Option(help="Folder for MNIST; what is missing there is downloaded.")] = Path("data"),
    out: Annotated[
        Path | None, typer.Option(help="Folder for model, curve and run.json.", show_default="runs/demo-TIME")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over both schools' images.")] = 2,
    lr: Annotated[float, typer.Option(min=0.0, help="SGD's learning rate.")] = 0.05,
    momentum: Annotated[float, typer.Option(min=0.0, max=1.0, help="SGD's momentum.")] = 0.9,
    decay: Annotated[
        bool, typer.Option(help="Let the learning rate fall to zero over the run; with --article it stays.")
    ] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 64,
    seed: Annotated[int, typer.Option(help="Seeds the model and the order of the images.")] = 0,
    owners: Annotated[
        bool,
        typer.Option("--owners", help="Split by who wrote the digits: students to one school, clerks to the other."),
    ] = False,
    article: Annotated[
        bool,
        typer.Option("--article", help="The article's settings, but for those given: lr 0.01, no momentum, 10 epochs."),
    ] = False,
    processes: Annotated[
        bool, typer.Option("--processes", help="Each school a process of its own, over mutual TLS.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=20, help="Use only so many training images (a quick look).")] = None,
) -> None:
    """Two schools train one digit classifier on real MNIST; the images stay where they are."""
    if article:
        given = {name for name in _ARTICLE if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
        chosen = {**_ARTICLE, **{name: context.params[name] for name in given}}
        epochs, lr, momentum = int(chosen["epochs"]), chosen["lr"], chosen["momentum"]
        decay = decay and str(context.get_parameter_source("decay")).endswith("COMMANDLINE")
    folder = out or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    _make(folder)
    from ._schools import Settings, Show, run, settle  # torch is imported here, so that --help stays quick

    settings = Settings(data, epochs, lr, momentum, batch_size, seed, owners, limit, processes, decay)
    result = run(settings, Show())
    settle(result, folder)
    if result.trouble:
        raise typer.Exit(1)


_ARTICLE = {"epochs": 10, "lr": 0.01, "momentum": 0.0}


def _make(folder: Path) -> None:
    """Make the folder now: what a run has learnt must not be lost for want of one. Raises `UsageError`."""
    try:
        if folder.exists() and any(folder.iterdir()):
            raise UsageError(f"--out {folder} is not empty: name a new folder, or leave it out")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").touch()
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be written: {error.strerror}") from None
