"""`housecall worker up`: run a worker in the foreground until Ctrl-C or SIGTERM."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.panel import Panel

from ..errors import UsageError
from ..host.config import host_and_port
from ..logs import write_logs
from ..sandbox.environment import begin_again, born_clean
from ..supervise import supervise
from .worker import Folder, worker_folder

if TYPE_CHECKING:
    from ..service import Service

__all__ = ["up"]


def up(
    folder: Folder = None,
    listen: Annotated[str, typer.Option(help="HOST:PORT instead of the one in worker.toml.")] = "",
    plaintext: Annotated[
        bool, typer.Option("--plaintext", help="Serve without TLS, to anyone who can connect. For tests.")
    ] = False,
    metrics: Annotated[str, typer.Option(help="HOST:PORT to answer Prometheus at; needs the extra 'metrics'.")] = "",
    once: Annotated[
        bool,
        typer.Option("--once", help="Do not start it anew when it dies: for systemd and containers, which do that."),
    ] = False,
    parent: Annotated[int, typer.Option(hidden=True)] = 0,
    restarts: Annotated[int, typer.Option(hidden=True)] = 0,
    died: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Run the worker until Ctrl-C. What has come is done and answered then.

    A second Ctrl-C ends it at once. If it dies, it is started anew."""
    place, where = worker_folder(folder).resolve(), _address(metrics)
    if listen:
        host_and_port(listen, "--listen")
    write_logs()
    if not once and sys.executable and sys.orig_argv:
        raise typer.Exit(supervise(_again, born_clean(os.environ)))
    began = parent, restarts, died
    _run(place, where, listen, plaintext, began)


def _again(restarts: int, died: str) -> list[str]:
    """This very command, as the child of this process."""
    told = ["--once", f"--parent={os.getpid()}", f"--restarts={restarts}", f"--died={died}"]
    return [sys.executable, *sys.orig_argv[1:], *told]


def _run(place: Path, where: tuple[str, int] | None, listen: str, plaintext: bool, began: tuple[int, int, str]) -> None:
    parent, restarts, died = began
    begin_again()
    from ..service import Service, confine, keep_memory, run  # torch is imported here, so that --help stays quick

    keep_memory()
    ports = () if where is None else (where[1],)
    sandbox = confine(place, listen=listen, plaintext=plaintext, ports=ports)
    service = Service(place, listen=listen, plaintext=plaintext, sandbox=sandbox, restarts=restarts, died=died)
    try:
        end_metrics = _metrics(service, where)
    except BaseException:
        service.close(0)
        raise
    console = Console(stderr=True)
    console.print(Panel(_described(service), title=f"worker [b]{service.config.name}[/b]", expand=False))
    try:
        run(service, lambda line: None, parent=parent)
    finally:
        end_metrics()
    console.print("ended")


def _address(where: str) -> tuple[str, int] | None:
    if not where:
        return None
    host, _, port = where.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--metrics takes HOST:PORT, such as 127.0.0.1:9464; found {where!r}")
    return host, int(port)


def _metrics(service: Service, where: tuple[str, int] | None) -> Callable[[], None]:
    if where is None:
        return lambda: None
    try:
        from ..metrics import serve_metrics  # its dependency is an extra
    except ImportError:
        raise UsageError("--metrics needs prometheus-client: pip install 'housecall[metrics]'") from None
    try:
        return serve_metrics(service.status, *where)
    except OSError as error:
        raise UsageError(f"--metrics cannot listen on {where[0]}:{where[1]}: {error.strerror}") from None


def _described(service: Service) -> str:
    where = service.address
    lines = [
        f"listens at  [b]{'grpcs' if where.secure else 'grpc'}://{where}[/b]",
        "over TLS    mutual" if where.secure else "over TLS    [red]no: whoever reaches it may do everything[/red]",
        f"computes    with {service.threads} threads, on {service.config.device}",
        f"data sets   {', '.join(service.catalogue.names()) or 'none yet: housecall worker add'}",
        f"sandbox     {_sandbox(service)}",
        f"keeps       a session whose client is gone for {service.config.lease_s:g} s",
        "Ctrl-C ends it, a second one at once; `housecall worker status` in another terminal shows its sessions",
    ]
    return "\n".join(lines)


def _sandbox(service: Service) -> str:
    missing = () if service.sandbox is None else service.sandbox.missing
    if not missing:
        return "all protections in force: housecall worker status"
    return f"[red]not in force: {', '.join(one.name for one in missing)}[/red]; the log says why"
