"""`housecall worker up`: run a worker in the foreground until Ctrl-C or SIGTERM."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.panel import Panel

from ..errors import UsageError
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
    metrics: Annotated[str, typer.Option(help="HOST:PORT to answer Prometheus at; needs housecall[metrics].")] = "",
) -> None:
    """Run the worker until Ctrl-C; then what has come is done and answered."""
    from ..service import Service, keep_memory, run  # torch is imported here, so that --help stays quick

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    keep_memory()
    service = Service(worker_folder(folder), listen=listen, plaintext=plaintext)
    end_metrics = _metrics(service, metrics)
    console = Console(stderr=True)
    console.print(Panel(_described(service), title=f"worker [b]{service.config.name}[/b]", expand=False))
    try:
        run(service, lambda line: None)
    finally:
        end_metrics()
    console.print("ended: what had come was done")


def _metrics(service: Service, where: str) -> Callable[[], None]:
    if not where:
        return lambda: None
    host, _, port = where.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--metrics takes HOST:PORT, such as 127.0.0.1:9464; found {where!r}")
    try:
        from ..metrics import serve_metrics  # its dependency is an extra
    except ImportError:
        raise UsageError("--metrics needs prometheus-client: pip install 'housecall[metrics]'") from None
    return serve_metrics(service.status, host, int(port))


def _described(service: Service) -> str:
    where = service.address
    lines = [
        f"listens at  [b]{'grpcs' if where.secure else 'grpc'}://{where}[/b]",
        "over TLS    mutual" if where.secure else "over TLS    [red]no: whoever reaches it may do everything[/red]",
        f"computes    with {service.threads} threads, on {service.config.device}",
        f"data sets   {', '.join(service.catalogue.names()) or 'none yet: housecall worker add'}",
        f"keeps       a session whose client is gone for {service.config.lease_s:g} s",
        "Ctrl-C ends it; `housecall worker status` in another terminal shows its sessions",
    ]
    return "\n".join(lines)
